"""Which benchmarks a run scores, and which pictures its stores are made of. Needs no cluster."""

import json
from pathlib import Path

import pytest

from cir_core.schema import CirError
from jobs.batch_retrieve import BatchRetrieveConfig
from jobs.benchmark_parts import ImageSources, combinations, find_parts


def test_a_list_runs_each_of_its_values_and_categories_run_by_default():
    labels = [label for label, _, _ in combinations("fashioniq", {})]
    assert labels == ["dress", "shirt", "toptee"]
    found = combinations("fashioniq", {"category": ["dress", "shirt"], "gallery": ["original", "val"]})
    assert [(label, group) for label, group, _ in found] == [
        ("dress original", "original"),
        ("dress val", "val"),
        ("shirt original", "original"),
        ("shirt val", "val"),
    ]
    assert found[1][2] == {"category": "dress", "gallery": "val"}
    assert combinations("cirr", {"targets": "soft"}) == [("", "", {"targets": "soft"})]
    assert combinations("genecis", {"task": "focus_object"}) == [("", "", {"task": "focus_object"})]
    for wrong in ([], ["dress", "dress"]):
        with pytest.raises(CirError, match="category must list at least one value"):
            combinations("fashioniq", {"category": wrong})


@pytest.fixture
def fashion(tmp_path):
    """FashionIQ with two categories: five pictures each, three of them used by the one query."""
    for number, category in enumerate(("dress", "shirt")):
        ids = [f"B{number}{place}" for place in range(60)]
        query = {"candidate": ids[3], "target": ids[1], "captions": ["is red", "is long"]}
        for name, value in (
            (f"captions/cap.{category}.val.json", [query]),
            (f"image_splits/split.{category}.val.json", ids),
        ):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(value))
        (tmp_path / "images").mkdir(exist_ok=True)
        for name in ids:
            (tmp_path / "images" / f"{name}.png").write_bytes(b"x")
    return tmp_path


def config(folder: Path, **changes):
    given = {"benchmark": "fashioniq", "root": str(folder), "protocol": {"category": ["dress", "shirt"]}}
    return BatchRetrieveConfig(**{**given, **changes})


def test_alpha_source_chosen_on_another_split_unless_it_is_given(fashion):
    parts = find_parts(config(fashion))
    assert [(part.label, part.group) for part in parts] == [("dress", ""), ("shirt", "")]
    assert all(part.selected is part.reported for part in parts)
    assert [part.selected for part in find_parts(config(fashion, alpha=0.8))] == [None, None]
    assert [part.selected for part in find_parts(config(fashion, methods=["text_only"]))] == [None, None]
    assert parts[0].below("runs") == "runs/dress"


def test_mistakes_in_what_is_asked_for(fashion, tmp_path):
    for changes, message in (
        ({"root": ""}, "--root is needed"),
        ({"k": 40}, "--k 40 is too short .* use at least 50"),
        ({"select_split": "test"}, "test"),
        ({"protocol": {"category": "dres"}}, "did you mean 'dress'"),
        ({"protocol": {"categry": "dress"}}, "did you mean 'category'"),
        ({"protocol": {"category": "dress", "split": "val"}}, "unknown option 'split' of fashioniq"),
        ({"gallery_ids": str(tmp_path / "ids.txt")}, "ids.txt"),
    ):
        with pytest.raises(CirError, match=message):
            find_parts(config(fashion, **changes))


def test_a_gallery_file_replaces_the_benchmarks_own(fashion):
    ids = [f"B0{place}" for place in range(59, -1, -1)]
    for name, text in (("ids.txt", "\n".join(ids) + "\n\n"), ("ids.json", json.dumps(ids))):
        (fashion / name).write_text(text)
        (part,) = find_parts(config(fashion, protocol={"category": "dress"}, gallery_ids=str(fashion / name)))
        assert part.reported.gallery_ids == tuple(ids)
        assert part.reported.protocol["gallery"] == "explicit"


def test_a_gallery_inside_another_shares_its_store(fashion):
    both = config(fashion, protocol={"category": ["dress", "shirt"], "gallery": ["original", "val"]}, k=50)
    benchmarks = [part.reported for part in find_parts(both)]
    sources = ImageSources(both)
    order = sorted(benchmarks, key=lambda item: -len(item.image_ids))
    places = {str(item.protocol["category"]) + str(item.protocol["gallery"]): sources.add(item) for item in order}
    assert places["dressval"] == places["dressoriginal"]
    assert places["shirtval"] == places["shirtoriginal"] != places["dressval"]
    assert [sum(len(unit.pictures) for unit in source.units) for source in sources.sources] == [60, 60]
    before = [source.digest for source in sources.sources]
    (fashion / "images" / "B07.png").write_bytes(b"another picture")
    again = ImageSources(both)
    for item in order:
        again.add(item)
    after = [source.digest for source in again.sources]
    assert sum(one == other for one, other in zip(before, after, strict=True)) == 1


def test_a_shared_store_in_another_order_would_break_ties(fashion):
    (fashion / "ids.txt").write_text("\n".join(f"B0{place}" for place in range(59, -1, -1)))
    forward = find_parts(config(fashion, protocol={"category": "dress"}))[0].reported
    (backward,) = find_parts(config(fashion, protocol={"category": "dress"}, gallery_ids=str(fashion / "ids.txt")))
    sources = ImageSources(config(fashion))
    assert sources.add(forward) != sources.add(backward.reported)


def test_missing_pictures_stop_the_run_or_are_left_out(fashion):
    (fashion / "images" / "B07.png").unlink()
    reported = find_parts(config(fashion))[0].reported
    with pytest.raises(CirError, match="1 of 60 images are missing: B07"):
        ImageSources(config(fashion)).add(reported)
    sources = ImageSources(config(fashion, missing_images="skip"))
    sources.add(reported)
    assert sum(len(unit.pictures) for unit in sources.sources[0].units) == 59


def test_a_composed_gallery_needs_captions(fashion):
    reported = find_parts(config(fashion))[0].reported
    with pytest.raises(CirError, match="give --gallery_captions"):
        ImageSources(config(fashion, gallery_alpha=0.2)).add(reported)
    (fashion / "captions.jsonl").write_text('{"id": "B07", "caption": "a dress"}\n')
    sources = ImageSources(config(fashion, gallery_alpha=0.2, gallery_captions=str(fashion / "captions.jsonl")))
    sources.add(reported)
    assert sources.sources[0].captions == "embed"
    texts = {picture.key: picture.caption for unit in sources.sources[0].units for picture in unit.pictures}
    assert texts["B07"] == "a dress"
    assert {text for name, text in texts.items() if name != "B07"} == {""}
    assert sources.captioned(reported) == {"gallery_captioned": 1}
    with pytest.raises(CirError, match="does nothing without --gallery_alpha"):
        ImageSources(config(fashion, gallery_captions=str(fashion / "captions.jsonl")))
    (fashion / "captions.jsonl").write_text('{"id": "B07.png", "caption": "a dress"}\n')
    wrong = ImageSources(config(fashion, gallery_alpha=0.2, gallery_captions=str(fashion / "captions.jsonl")))
    with pytest.raises(CirError, match="none of its ids is an image of"):
        wrong.add(reported)


def test_labels_that_would_share_a_folder_are_refused():
    with pytest.raises(CirError, match="would share a folder"):
        combinations("domain_conversion", {"text": ["a {domain} of", "a-{domain} of"]})
