"""GeneCIS and domain conversion: made-up folders, crops, galleries of a query's own, and bad input."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cir_core.benchmarks import Crop, ImageFiles, load_benchmark
from cir_core.preprocessing import ImageError, Preprocessing, preprocess_image
from cir_core.schema import CirError, Query


def coco(number):
    return {"val_image_id": number}


def genome(number, box=(10, 20, 30, 40)):
    return {"image_id": number, "instance_bbox": list(box)}


def object_row(**changes):
    return {"condition": "wall", "reference": coco(1), "target": coco(2), "gallery": [coco(3), coco(4)], **changes}


def attribute_row(**changes):
    base = {
        "condition": "shiny",
        "reference": genome(1),
        "target": genome(2),
        "gallery": [genome(2, (0, 0, 9, 9.5)), genome(3)],
    }
    return {**base, **changes}


def genecis(root: Path, task, rows, *, base="genecis"):
    path = root / base / f"{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return root


@pytest.mark.parametrize("base", ["", "genecis", "GeneCIS", "genecis/genecis"])
def test_object_task_in_every_layout(tmp_path, base):
    root = genecis(tmp_path, "change_object", [object_row(), object_row(gallery=[coco(4), coco(5)])], base=base)
    benchmark = load_benchmark("genecis", root, task="change_object")
    assert benchmark.queries[0] == Query("change_object-0", "1", "wall", ("2",), ("2", "3", "4"))
    assert benchmark.gallery_ids == ("2", "3", "4", "5")
    assert benchmark.image_ids == ("2", "3", "4", "5", "1")
    assert (benchmark.own_galleries, benchmark.ties, benchmark.crops) == (True, "against_target", {})
    assert benchmark.ranked_sizes() == (3, 3)
    (root / "val2017").mkdir()
    for number in range(1, 6):
        (root / "val2017" / f"{number:012d}.jpg").write_bytes(b"x")
    assert Path(benchmark.image_files()["5"].uri).name == "000000000005.jpg"


def test_a_distractor_that_is_the_target_is_left_out_and_counted(tmp_path):
    root = genecis(tmp_path, "focus_object", [object_row(gallery=[coco(3), coco(2), coco(4)])])
    benchmark = load_benchmark("genecis", root, task="focus_object")
    assert benchmark.queries[0].subset_ids == ("2", "3", "4")
    assert benchmark.protocol["repeated_images_left_out"] == 1


def test_attribute_tasks_name_and_describe_their_crops(tmp_path):
    root = genecis(tmp_path, "focus_attribute", [attribute_row()])
    benchmark = load_benchmark("genecis", root, task="focus_attribute")
    own = ("2_10_20_30_40", "2_0_0_9_9.5", "3_10_20_30_40")
    assert benchmark.queries[0] == Query("focus_attribute-0", "1_10_20_30_40", "shiny", own[:1], own)
    assert set(benchmark.crops) == {*own, "1_10_20_30_40"}
    assert benchmark.crops[own[1]] == Crop(0, 0, 9, 9.5, dilation=0.7, pad_square=True)
    tight = load_benchmark("genecis", root, task="focus_attribute", crop="tight")
    assert tight.crops[own[0]] == Crop(10, 20, 30, 40, pad_square=True)
    for number, folder in ((1, "VG_100K"), (2, "VG_100K_2"), (3, "VG_100K")):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / f"{number}.jpg").write_bytes(b"x")
    found = benchmark.image_files()
    assert found[own[0]] == found[own[1]]
    assert Path(found[own[0]].uri).parts[-2:] == ("VG_100K_2", "2.jpg")


def test_whole_pictures_instead_of_crops(tmp_path):
    root = genecis(tmp_path, "change_attribute", [attribute_row()])
    benchmark = load_benchmark("genecis", root, task="change_attribute", crop="whole")
    assert (benchmark.queries[0].subset_ids, benchmark.crops) == (("2", "3"), {})
    assert benchmark.protocol["repeated_images_left_out"] == 1  # two boxes of one picture are one image here


def test_a_box_grows_to_the_left_and_the_top_only():
    crop = Crop(200, 100, 100, 50, dilation=0.7)
    assert crop.box(640, 480) == (130, 65, 300, 150)  # right and lower edges are those of the object
    assert Crop(200, 100, 100, 50).box(640, 480) == (200, 100, 300, 150)
    assert Crop(20, 100, 100, 50, dilation=0.7).box(640, 480) == (0, 65, 170, 150)  # held at the border: as published
    assert crop.box(250, 120) == (130, 65, 250, 120)


def test_a_crop_is_cut_and_padded_before_preprocessing():
    pixels = np.random.default_rng(0).integers(1, 256, (80, 100, 3), dtype=np.uint8)
    crop = Crop(40, 20, 20, 30, dilation=0.5, pad_square=True)
    assert crop.box(100, 80) == (30, 5, 60, 50)
    square = np.asarray(crop.cut(Image.fromarray(pixels)))
    assert square.shape == (45, 45, 3)
    assert np.array_equal(square[:, 7:37], pixels[5:50, 30:60])
    assert not square[:, :7].any()
    assert not square[:, 37:].any()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    whole = preprocess_image(stream.getvalue(), Preprocessing(45), cut=crop.cut)
    assert np.array_equal(whole, square.transpose(2, 0, 1))
    with pytest.raises(ImageError, match=r"outside: .* in a picture of 100 x 80 pixels"):
        preprocess_image(stream.getvalue(), Preprocessing(45), cut=Crop(200, 20, 20, 30).cut)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("change_object", [object_row(gallery=[])], None),
        ("change_object", [object_row(target=None)], "entry 0: 'target' must be a JSON object, found None"),
        ("change_object", [object_row(gallery=[3])], "'gallery' must be a list of JSON objects"),
        ("change_object", [object_row(gallery=[{}])], r"gallery\[0\]: 'val_image_id' must be made of ids.*no such key"),
        ("change_object", [object_row(condition=None)], "'condition' must be a string"),
        ("focus_attribute", [attribute_row(target=genome(2, (1, 2, 3)))], "'instance_bbox' must be .left, top"),
        ("focus_attribute", [attribute_row(target=genome(2, (1, 2, 0, 3)))], "of some size"),
        ("focus_attribute", [attribute_row(target=genome(2, (1, 2, "3", 3)))], "must be a list of numbers"),
        ("focus_attribute", "[{}", "focus_attribute.json: not a JSON file"),
    ],
)
def test_faulty_genecis_files_are_named(tmp_path, task, rows, message):
    root = genecis(tmp_path, task, rows)
    if message is None:
        assert load_benchmark("genecis", root, task=task).ranked_sizes() == (1,)
        return
    with pytest.raises(CirError, match=message):
        load_benchmark("genecis", root, task=task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "task is needed; known: change_attribute"),
        ({"task": "change_objects"}, "did you mean 'change_object'"),
        ({"task": "focus_object"}, r"focus_object.json is missing .*get it from https://github.com/facebookresearch"),
        ({"task": "change_object", "crop": "wide"}, "crop must not be 'wide'"),
        ({"task": "change_object", "split": "test"}, "split must not be 'test'"),
        ({"task": "change_object", "gallery_ids": [2, 3]}, "its subset member '4' is not in the gallery"),
    ],
)
def test_wrong_genecis_options_are_named(tmp_path, options, message):
    with pytest.raises(CirError, match=message):
        load_benchmark("genecis", genecis(tmp_path, "change_object", [object_row()]), **options)


PHOTOS = ["real/n01/a.JPEG", "real/n01/b.JPEG", "real/n02/c.JPEG"]
ART = ["n01/cartoon_0.jpg", "n01/cartoon_1.jpg", "n01/toy_0.jpg", "n02/origami_3.jpg", "n02/sculpture_0.jpg"]
LABELS = [0, 0, 2000, 1001, 3001]


def domain_lists(root: Path, photos=None, art=None):
    base = root / "imgnet"
    base.mkdir(parents=True)
    photos = [f"imgnet/{path} {int(path[7]) - 1} " for path in PHOTOS] if photos is None else photos
    pairs = zip(ART, LABELS, strict=True)
    art = [f"imgnet/imagenet-r/{path} {label} " for path, label in pairs] if art is None else art
    (base / "imgnet_real_query.txt").write_text("\n".join(photos) + "\n")
    (base / "imgnet_targets.txt").write_text("\n".join(art) + "\n")
    return root


def domain_folders(root: Path):
    extra = ["imagenet-r/n01/sketch_0.jpg", "imagenet-r/README.txt", "real/n99/z.JPEG"]  # no domain, picture, class
    for path in [*PHOTOS, *(f"imagenet-r/{path}" for path in ART), *extra]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


@pytest.mark.parametrize("layout", [domain_lists, domain_folders])
def test_domain_conversion_from_lists_and_from_folders(tmp_path, layout):
    benchmark = load_benchmark("domain_conversion", layout(tmp_path))
    assert benchmark.gallery_ids == tuple(f"imagenet-r/{path[:-4]}" for path in ART)
    assert len(benchmark.queries) == 3 * 4
    cartoons = ("imagenet-r/n01/cartoon_0", "imagenet-r/n01/cartoon_1")
    assert benchmark.queries[0] == Query("cartoon/n01/a", "real/n01/a", "a cartoon of", cartoons)
    assert benchmark.recall == "fraction"
    assert benchmark.protocol["queries_without_target"] == 6
    excluded = load_benchmark("domain_conversion", tmp_path, no_target="excluded", recall="hit")
    assert (len(excluded.queries), excluded.recall, excluded.empty_targets) == (6, "any", False)
    assert set(excluded.query_kinds.values()) == {"cartoon", "origami", "toy", "sculpture"}


def test_domain_conversion_pictures_texts_and_galleries(tmp_path):
    root = domain_folders(tmp_path)
    benchmark = load_benchmark("domain_conversion", root, text="{domain}, please")
    assert benchmark.queries[3].relative_caption == "origami, please"
    found = benchmark.image_files()
    assert len(found) == 8
    assert Path(found["real/n01/b"].uri).name in ("b.jpeg", "b.JPEG")
    part = load_benchmark("domain_conversion", root, gallery_ids=["imagenet-r/n01/toy_0"])
    assert part.protocol["photos_of_classes_without_gallery_images"] == 2
    assert [query.target_ids for query in part.queries if query.target_ids] == [("imagenet-r/n01/toy_0",)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall": "hits"}, "did you mean 'hit'"),
        ({"no_target": "skip"}, "no_target must not be 'skip'"),
        ({"text": "a cartoon of"}, "text must hold '{domain}'"),
        ({"split": "test"}, "split must not be 'test'"),
    ],
)
def test_wrong_domain_options_are_named(tmp_path, options, message):
    with pytest.raises(CirError, match=message):
        load_benchmark("domain_conversion", domain_lists(tmp_path), **options)


@pytest.mark.parametrize(
    ("art", "message"),
    [
        (["imgnet/imagenet-r/n01/cartoon_0.jpg"], r"imgnet_targets.txt, line 1: expected '.*/imagenet-r/<class>"),
        (["imgnet/imagenet-r/n01/cartoon_0.jpg 2000"], "label 2000 does not mean the domain of 'cartoon_0.jpg'"),
        (["imgnet/imagenet-r/n01/sketch_0.jpg 4000"], "label 4000 does not mean"),
        (["cartoon_0.jpg 0"], "line 1: expected"),
        (["a/imagenet-r/n01/toy_0.jpg 2000"] * 2, "gallery id 'imagenet-r/n01/toy_0' is listed twice"),
        ([""], "need both"),
    ],
)
def test_faulty_domain_lists_are_named(tmp_path, art, message):
    with pytest.raises(CirError, match=message):
        load_benchmark("domain_conversion", domain_lists(tmp_path, art=art))


def test_missing_domain_files_are_named(tmp_path):
    with pytest.raises(CirError, match=r"imgnet_targets.txt nor a folder imagenet-r .*github.com/google-research"):
        load_benchmark("domain_conversion", tmp_path)
    root = domain_lists(tmp_path)
    (root / "imgnet/imgnet_real_query.txt").unlink()
    with pytest.raises(CirError, match=r"imgnet/imgnet_real_query.txt nor the folder .*imgnet/real is there"):
        load_benchmark("domain_conversion", root)
    with pytest.raises(CirError, match="3 of 8 images are missing"):
        load_benchmark("domain_conversion", half_the_pictures(tmp_path / "half")).image_files()


def half_the_pictures(root: Path):
    domain_lists(root)
    for path in ART:
        (root / "imgnet/imagenet-r" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "imgnet/imagenet-r" / path).write_bytes(b"x")
    return root


def test_image_files_look_in_every_folder_in_order(tmp_path):
    for folder, names in (("one", ["a.png"]), ("two", ["a.jpg", "b.jpg", "sub/c.png"])):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(b"x")
    folders = tuple(str(tmp_path / folder) for folder in ("one", "absent", "two"))
    images = ImageFiles(folders, "a shop", {"third": "sub/c"})
    found = images.locate(["b", "a", "third"])
    assert [str(Path(file.uri).relative_to(tmp_path)) for file in found.values()] == [
        "two/b.jpg",
        "one/a.png",
        "two/sub/c.png",
    ]
    with pytest.raises(CirError, match=r"1 of 2 images are missing: c; .*get them from a shop"):
        images.locate(["c", "a"])
