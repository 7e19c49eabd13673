"""FashionIQ: made-up folders in every documented layout, the six caption joins, and every kind of bad input."""

import json
from pathlib import Path

import pytest
import torch

from cir_core.benchmarks import load_benchmark
from cir_core.benchmarks.fashioniq import CAPTION_JOINS
from cir_core.composition import mean_texts
from cir_core.schema import CirError, Query

IDS = ["B1", "B2", "B3", "B4"]


def row(**changes):
    return {"candidate": "B3", "target": "B1", "captions": ["is Red.", " has long sleeves "], **changes}


def folder(root: Path, rows=None, *, base="", captions="captions", split="val", ids=IDS, category="dress"):
    for name, value in (
        (f"{captions}/cap.{category}.{split}.json", [row()] if rows is None else rows),
        (f"image_splits/split.{category}.{split}.json", ids),
    ):
        path = root / base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return root


@pytest.mark.parametrize(
    ("base", "captions"),
    [
        ("", "captions"),
        ("FashionIQ", "captions"),
        ("fashionIQ_dataset", "captions"),
        ("fashioniq", "captions"),
        ("fashion-iq", "json"),
    ],
)
def test_every_layout(tmp_path, base, captions):
    root = folder(tmp_path, base=base, captions=captions)
    benchmark = load_benchmark("fashioniq", root, split="val", category="dress", gallery="original")
    assert benchmark.queries == (Query("dress-0", "B3", "is Red and has long sleeves", ("B1",)),)
    assert benchmark.gallery_ids == tuple(IDS)
    assert not benchmark.reference_removed
    (root / base / "images").mkdir()
    for name, suffix in zip(IDS, (".png", ".jpg", ".jpeg", ".jpg"), strict=True):
        (root / base / "images" / f"{name}{suffix}").write_bytes(b"x")
    assert [Path(file.uri).name for file in benchmark.image_files().values()] == [
        "B1.png",
        "B2.jpg",
        "B3.jpeg",
        "B4.jpg",
    ]


def test_the_val_gallery_is_what_the_queries_use_in_split_order(tmp_path):
    root = folder(tmp_path, [row(), row(candidate="B4", target="B3")])
    assert load_benchmark("fashioniq", root, category="dress", gallery="val").gallery_ids == ("B1", "B3", "B4")
    explicit = load_benchmark("fashioniq", root, category="dress", gallery_ids=["B3", "B1"])
    assert (explicit.gallery_ids, explicit.image_ids) == (("B3", "B1"), ("B3", "B1", "B4"))
    with pytest.raises(CirError, match="'B9' of a query is not in the split file"):
        load_benchmark("fashioniq", folder(tmp_path, [row(target="B9")]), category="dress", gallery="val")


@pytest.mark.parametrize(
    ("join", "captions"),
    [
        ("and", [("is Red and has long sleeves",)]),
        ("reversed", [("has long sleeves and is Red",)]),
        ("averaged", [("is Red and has long sleeves", "has long sleeves and is Red")]),
        ("comma", [("is Red, has long sleeves",)]),
        ("capitalized", [("Is red and has long sleeves",)]),
        ("separate", [("is Red",), ("has long sleeves",)]),
    ],
)
def test_caption_joins(tmp_path, join, captions):
    benchmark = load_benchmark("fashioniq", folder(tmp_path), category="dress", caption_join=join)
    assert [query.captions for query in benchmark.queries] == captions
    assert len({query.query_id for query in benchmark.queries}) == len(captions)
    assert {query.target_ids for query in benchmark.queries} == {("B1",)}
    assert benchmark.protocol["caption_join"] == join
    assert benchmark.protocol["text"] == CAPTION_JOINS[join][0]


def test_an_empty_caption_is_valid_and_counted(tmp_path):
    root = folder(tmp_path, [row(captions=["", "is grey"])])
    benchmark = load_benchmark("fashioniq", root, category="dress", caption_join="separate")
    assert [query.relative_caption for query in benchmark.queries] == ["", "is grey"]
    assert benchmark.protocol["empty_captions"] == 1
    assert load_benchmark("fashioniq", root, category="dress").queries[0].relative_caption == " and is grey"


def test_the_test_split_has_no_targets(tmp_path):
    root = folder(tmp_path, [{"candidate": "B3", "captions": ["a", "b"]}], split="test")
    benchmark = load_benchmark("fashioniq", root, split="test", category="dress")
    assert not benchmark.has_targets
    with pytest.raises(CirError, match="gallery 'val' needs targets"):
        load_benchmark("fashioniq", root, split="test", category="dress", gallery="val")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "category is needed; known: dress, shirt, toptee"),
        ({"category": "dresses"}, "category must not be 'dresses'; did you mean 'dress'"),
        ({"category": "dress", "gallery": "orginal"}, "did you mean 'original'"),
        ({"category": "dress", "caption_join": "average"}, "did you mean 'averaged'"),
        ({"category": "dress", "reference": None}, "reference must not be None"),
        ({"category": "dress", "split": "train"}, "split must not be 'train'; .*known: test, val"),
        ({"category": "shirt"}, r"captions/cap.shirt.val.json is missing .*get it from https://github.com/Xiaoxiao"),
    ],
)
def test_wrong_options_and_missing_files_are_named(tmp_path, options, message):
    with pytest.raises(CirError, match=message):
        load_benchmark("fashioniq", folder(tmp_path), **options)


@pytest.mark.parametrize(
    ("rows", "ids", "message"),
    [
        ([row(captions=["one"])], IDS, "entry 0: 'captions' must be a list of two captions, found"),
        ([row(captions=["one", 2])], IDS, "'captions' must be a list of strings"),
        ([row(), row(target=None)], IDS, "entry 1: 'target' must be made of ids"),
        ([row(target="B9")], IDS, "query 'dress-0': its target 'B9' is not in the gallery"),
        ([row(candidate="B9")], IDS, "query 'dress-0': its reference 'B9' is not in the gallery"),
        ([row()], [*IDS, "B1"], "gallery id 'B1' is listed twice"),
        ([row()], [*IDS, 3], "expected a JSON list of image ids"),
        ([row()], "[", "split.dress.val.json: not a JSON file"),
    ],
)
def test_faulty_files_are_named(tmp_path, rows, ids, message):
    with pytest.raises(CirError, match=message):
        load_benchmark("fashioniq", folder(tmp_path, rows, ids=ids), category="dress")


def test_the_split_file_that_is_missing_is_named(tmp_path):
    root = folder(tmp_path, base="FashionIQ")
    (root / "FashionIQ/image_splits/split.dress.val.json").unlink()
    with pytest.raises(CirError, match=r"FashionIQ/image_splits/split.dress.val.json is missing; get it from"):
        load_benchmark("fashioniq", root, category="dress")


def test_mean_texts_averages_unit_embeddings_and_leaves_single_captions_alone():
    text_TD = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    mean_QD = mean_texts(text_TD, [1, 3, 1])
    assert torch.equal(mean_QD[[0, 2]], text_TD[[0, 4]])
    expected = torch.nn.functional.normalize(text_TD[1:4].double().mean(dim=0), dim=-1)
    assert torch.allclose(mean_QD[1].double(), expected, atol=1e-7)
    assert mean_texts(text_TD, [1] * 5) is text_TD
    assert mean_texts(text_TD.double(), [2, 3]).dtype == torch.float64
    for counts in ([1, 3], [0, 5], [6]):
        with pytest.raises(CirError, match="add up to 5 captions"):
            mean_texts(text_TD, counts)
    with pytest.raises(CirError, match="position 1 cancel out"):
        mean_texts(torch.stack([text_TD[0], text_TD[1], -text_TD[1]]), [1, 2])
    with pytest.raises(CirError, match="unit norm"):
        mean_texts(2 * text_TD, [2, 3])
