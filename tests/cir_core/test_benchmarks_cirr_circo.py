"""CIRR and CIRCO: made-up folders in every documented layout, and every kind of bad input."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cir_core.benchmarks import load_benchmark, protocol_options
from cir_core.evaluation import evaluate
from cir_core.schema import CirError, Query, Ranking

NAMES = [f"dev-{number}-0-img0" for number in range(8)]


def cirr_row(**changes):
    row = {
        "pairid": 12,
        "reference": NAMES[0],
        "target_hard": NAMES[1],
        "target_soft": {NAMES[1]: 1.0, NAMES[2]: 0.5, NAMES[0]: 0.5, NAMES[3]: -1.0},
        "caption": "remove the dog",
        "img_set": {"id": 1, "members": NAMES[:6]},
    }
    return {**row, **changes}


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def cirr_folder(root: Path, rows=None, *, inner="cirr", split="val", names=NAMES):
    rows = [cirr_row()] if rows is None else rows
    write(root / inner / f"captions/cap.rc2.{split}.json", rows)
    write(root / inner / f"image_splits/split.rc2.{split}.json", {name: f"./dev/{name}.png" for name in names})
    return root


@pytest.mark.parametrize("inner", ["", "cirr", "CIRR/cirr", "cirr_dataset/cirr", "CIRR", "cirr_dataset"])
def test_cirr_in_every_layout(tmp_path, inner):
    benchmark = load_benchmark("cirr", cirr_folder(tmp_path, inner=inner))
    assert benchmark.queries == (Query("12", NAMES[0], "remove the dog", (NAMES[1],), tuple(NAMES[:6])),)
    assert benchmark.gallery_ids == tuple(NAMES)
    assert benchmark.headline == "mean_recall@5_recall_subset@1"
    assert {"recall@1", "recall@50", "recall_subset@3"} <= set(benchmark.metrics)
    assert (benchmark.reference_removed, benchmark.protocol["targets"]) == (True, "hard")


def test_cirr_soft_values_leave_the_removed_reference_out(tmp_path):
    benchmark = load_benchmark("cirr", cirr_folder(tmp_path), targets="soft")
    assert benchmark.soft_targets == {"12": {NAMES[1]: 1.0, NAMES[2]: 0.5, NAMES[3]: -1.0}}
    assert benchmark.protocol["queries_without_reachable_soft_target"] == 0
    kept = load_benchmark("cirr", tmp_path, targets="soft", reference="kept")
    assert kept.soft_targets["12"][NAMES[0]] == 0.5


def test_cirr_test_split_has_no_targets_and_an_empty_caption_is_valid(tmp_path):
    row = cirr_row(caption=" ")
    del row["target_hard"], row["target_soft"]
    benchmark = load_benchmark("cirr", cirr_folder(tmp_path, [row], split="test1"), split="test1")
    assert not benchmark.has_targets
    assert (benchmark.queries[0].relative_caption, benchmark.queries[0].target_ids) == ("", ())


def test_an_explicit_gallery_replaces_the_benchmarks_own(tmp_path):
    root = cirr_folder(tmp_path)
    benchmark = load_benchmark("cirr", root, gallery_ids=[*NAMES[::-1], "more"])
    assert benchmark.gallery_ids == (*NAMES[::-1], "more")
    assert (benchmark.protocol["gallery"], benchmark.protocol["gallery_size"]) == ("explicit", 9)
    assert load_benchmark("cirr", root, gallery_ids=np.array(NAMES)).gallery_ids == tuple(NAMES)
    for gallery, message in [
        (set(NAMES), "gallery_ids must be a list of image ids"),
        (NAMES[2:], f"its target '{NAMES[1]}' is not in the gallery"),
        (NAMES[:5], f"its subset member '{NAMES[5]}' is not in the gallery"),
        ([*NAMES, NAMES[3]], f"gallery id '{NAMES[3]}' is listed twice"),
        (NAMES[0], "gallery_ids must be a list of image ids"),
        ([*NAMES, ""], "gallery_ids must hold non-empty strings"),
        ([*NAMES, 1.5], "found 1.5"),
        ([], "0 gallery images"),
    ]:
        with pytest.raises(CirError, match=message):
            load_benchmark("cirr", root, gallery_ids=gallery)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([cirr_row(), cirr_row()], "query id '12' is listed twice"),
        ([cirr_row(), cirr_row(pairid=None)], r"cap.rc2.val.json, entry 1: 'pairid' must be made of ids.*found None"),
        ([cirr_row(pairid=True)], "'pairid' must be made of ids"),
        ([cirr_row(reference="")], "'reference' must be made of ids.*found ''"),
        ([cirr_row(caption=None)], "'caption' must be a string, found None"),
        ([cirr_row(target_hard="elsewhere")], "'target_hard' must be a member of the query's group, found 'elsewhere'"),
        ([cirr_row(img_set={"members": NAMES[:5]})], "'img_set' must be a group of six images"),
        ([cirr_row(img_set={"members": NAMES[1:7]})], f"with the reference '{NAMES[0]}' among them"),
        ([cirr_row(img_set=[])], "'img_set' must be a JSON object"),
        ([cirr_row(target_soft={NAMES[1]: "1"})], "'target_soft' must be an object of numbers"),
        ([cirr_row(target_hard=NAMES[0])], "is a target, yet removed by the protocol"),
        ([{key: value for key, value in cirr_row().items() if key != "caption"}], "no such key among"),
        ([3], "entry 0: expected a JSON object, found 3"),
        ([], "expected a JSON list of at least one object"),
        ({"a": 1}, "expected a JSON list"),
        ("[{", "cap.rc2.val.json: not a JSON file"),
    ],
)
def test_faulty_cirr_captions_are_named(tmp_path, rows, message):
    with pytest.raises(CirError, match=message):
        load_benchmark("cirr", cirr_folder(tmp_path, rows), targets="soft")


def test_faulty_cirr_galleries_and_options_are_named(tmp_path):
    root = cirr_folder(tmp_path, names=NAMES[:5])
    with pytest.raises(CirError, match=f"query '12': its subset member '{NAMES[5]}' is not in the gallery"):
        load_benchmark("cirr", root)
    write(root / "cirr/image_splits/split.rc2.val.json", NAMES)
    with pytest.raises(CirError, match="expected a JSON object of image name -> path"):
        load_benchmark("cirr", root)
    for options, message in [
        ({"split": "test"}, "split must not be 'test'; did you mean 'test1'"),
        ({"targets": "sof"}, "targets must not be 'sof'; did you mean 'soft'. known: hard, soft"),
        ({"reference": "remove"}, "did you mean 'removed'"),
        ({"target": "soft"}, "unknown protocol option 'target'; did you mean 'targets'"),
        ({"gallery": ["a"]}, "did you mean 'gallery_ids'"),
    ]:
        with pytest.raises(CirError, match=message):
            load_benchmark("cirr", root, **options)


def test_the_exact_missing_file_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(CirError, match=f"the folder {tmp_path}/none does not exist"):
        load_benchmark("cirr", tmp_path / "none")
    root = cirr_folder(tmp_path, inner="CIRR/cirr")
    (root / "CIRR/cirr/image_splits/split.rc2.val.json").unlink()
    with pytest.raises(CirError, match=r"split.rc2.val.json is missing .*get it from https://github.com/Cuberick"):
        load_benchmark("cirr", root)
    with pytest.raises(CirError, match=r"captions/cap.rc2.test1.json is missing"):
        load_benchmark("cirr", root, split="test1")


def circo_row(number=0, **changes):
    row = {
        "id": number,
        "reference_img_id": 7,
        "target_img_id": 11,
        "gt_img_ids": [11, 13],
        "relative_caption": "is red",
        "shared_concept": "a car",
        "semantic_aspects": ["negation", "viewpoint"],
    }
    return {**row, **changes}


def circo_folder(root: Path, rows=None, *, base="", coco="COCO2017_unlabeled", ids=(7, 11, 13, 17)):
    write(root / base / "annotations/val.json", [circo_row()] if rows is None else rows)
    write(
        root / base / "annotations/test.json",
        [{"id": 0, "reference_img_id": 7, "relative_caption": "", "shared_concept": "x"}],
    )
    if coco is not None:
        listing = {"images": [{"id": number, "file_name": f"{number:012d}.jpg"} for number in ids]}
        write(root / base / coco / "annotations/image_info_unlabeled2017.json", listing)
    return root


@pytest.mark.parametrize(("base", "coco"), [("", "COCO2017_unlabeled"), ("CIRCO", "COCO2017_unlabeled"), ("circo", "")])
def test_circo_in_every_layout(tmp_path, base, coco):
    benchmark = load_benchmark("circo", circo_folder(tmp_path, base=base, coco=coco))
    assert benchmark.queries == (Query("0", "7", "is red", ("11", "13")),)
    assert benchmark.gallery_ids == ("7", "11", "13", "17")
    assert "4 of its 123403 images" in str(benchmark.protocol["gallery"])
    assert not benchmark.reference_removed
    assert [name for name, ids in benchmark.aspects.items() if ids] == ["negation", "viewpoint"]
    assert len(benchmark.aspects) == 9
    ranking = Ranking(("0",), np.array([["13", "7", "11", "17"]]), np.array([[4, 3, 2, 1]], dtype=np.float32))
    four = replace(benchmark, metrics=("recall@1", "recall@3", "map@1", "map@10"), headline="map@1")
    scores = evaluate(ranking, four).metrics  # recall knows the annotated target alone, map every ground truth
    assert (scores["recall@1"], scores["recall@3"], scores["map@1"], scores["map@10"]) == (0, 1, 1, (1 + 2 / 3) / 2)
    test = load_benchmark("circo", tmp_path, split="test")
    assert (test.has_targets, test.queries[0].relative_caption) == (False, "")


def test_circo_options(tmp_path):
    assert protocol_options("circo") == {"reference": "kept", "shared_concept": "off"}
    root = circo_folder(tmp_path)
    for value in ("on", True):
        benchmark = load_benchmark("circo", root, shared_concept=value, reference="removed")
        assert benchmark.queries[0].relative_caption == "a car, but is red"
        assert benchmark.protocol["shared_concept"] == "on"
        assert benchmark.reference_removed
    assert load_benchmark("circo", root, shared_concept=False).queries[0].relative_caption == "is red"
    with pytest.raises(CirError, match="shared_concept must not be 1"):
        load_benchmark("circo", root, shared_concept=1)


def test_circo_without_its_image_list_takes_an_explicit_gallery(tmp_path):
    root = circo_folder(tmp_path, coco=None)
    with pytest.raises(CirError, match=r"image_info_unlabeled2017.json is missing .*zip, or pass gallery_ids"):
        load_benchmark("circo", root)
    benchmark = load_benchmark("circo", root, gallery_ids=[11, 13])  # the reference lies outside
    assert benchmark.gallery_ids == ("11", "13")
    assert benchmark.image_ids == ("11", "13", "7")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([circo_row(gt_img_ids=[])], "'gt_img_ids' must be ground truths that start with the target 11"),
        ([circo_row(gt_img_ids=[13, 11])], "start with the target 11"),
        ([circo_row(gt_img_ids=[11, 11])], "query '0': target '11' is listed twice"),
        ([circo_row(gt_img_ids=[11, 99])], "query '0': its target '99' is not in the gallery"),
        ([circo_row(reference_img_id=99)], "query '0': its reference '99' is not in the gallery"),
        ([circo_row(), circo_row()], "query id '0' is listed twice"),
        ([circo_row(semantic_aspects=["negatio"])], "did you mean 'negation'"),
        ([circo_row(semantic_aspects=None)], "'semantic_aspects' must be a list of strings"),
        ([circo_row(gt_img_ids=11)], "'gt_img_ids' must be a list of ids"),
        ([circo_row(shared_concept="")], "'shared_concept' must be a non-empty string"),
        ("{", "val.json: not a JSON file"),
    ],
)
def test_faulty_circo_annotations_are_named(tmp_path, rows, message):
    with pytest.raises(CirError, match=message):
        load_benchmark("circo", circo_folder(tmp_path, rows), shared_concept="on")


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ({"images": []}, "a list under 'images'"),
        ({"images": [3]}, "image 0: expected a JSON object"),
        ({"images": [{"file_name": "x.jpg"}]}, "image 0: 'id' must be"),
        ({"images": [{"id": 7}, {"id": 7}]}, "gallery id '7' is listed twice"),
    ],
)
def test_a_faulty_coco_list_is_named(tmp_path, listing, message):
    root = circo_folder(tmp_path)
    write(root / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", listing)
    with pytest.raises(CirError, match=message):
        load_benchmark("circo", root)


def test_pictures_are_found_when_they_are_asked_for(tmp_path):
    root = cirr_folder(tmp_path)
    benchmark = load_benchmark("cirr", root)
    with pytest.raises(
        CirError, match=r"8 of 8 images are missing: dev-0-0-img0, .* and 3 more; looked for .png, .jpg"
    ):
        benchmark.image_files()
    suffixes = [".png", ".jpg", ".jpeg", ".JPG", ".PNG", ".png", ".png", ".png"]
    for name, suffix in zip(NAMES, suffixes, strict=True):
        write(root / "dev" / f"{name}{suffix}", "x")
    write(root / "dev" / f"{NAMES[0]}.jpg", "a second copy")
    found = benchmark.image_files()
    assert list(found) == NAMES
    assert [Path(file.uri).name for file in found.values()] == [n + s for n, s in zip(NAMES, suffixes, strict=True)]
    assert list(benchmark.image_files([NAMES[4]])) == [NAMES[4]]
    (root / "dev" / f"{NAMES[2]}.jpeg").rename(root / "dev" / f"{NAMES[2]}.webp")
    with pytest.raises(CirError, match=f"1 of 8 images are missing: {NAMES[2]}; .*get them from https"):
        benchmark.image_files()
    circo = load_benchmark("circo", circo_folder(tmp_path / "circo", coco=None), gallery_ids=[11, 13])
    for number in (7, 11, 13):
        write(tmp_path / f"circo/COCO2017_unlabeled/unlabeled2017/{number:012d}.jpg", "x")
    assert [Path(file.uri).name for file in circo.image_files().values()] == [f"{n:012d}.jpg" for n in (11, 13, 7)]
