"""A benchmark less some images, captions of gallery images, and galleries composed with them."""

import json
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cir_core import files
from cir_core.benchmarks import Benchmark, Crop, read_captions
from cir_core.composition import compose_gallery, slerp
from cir_core.evaluation import evaluate
from cir_core.schema import CirError, Query, Ranking

GALLERY = ("a", "b", "c", "d", "e", "f")


def benchmark(queries, **changes):
    given = {
        "name": "made-up",
        "split": "val",
        "queries": tuple(queries),
        "gallery_ids": GALLERY,
        "protocol": {"reference": "kept", "gallery_size": 6},
        "metrics": ("recall@1", "map@2"),
        "headline": "recall@1",
    }
    return Benchmark(**{**given, **changes})


QUERIES = [
    Query("its reference goes", "a", "x", ("b",)),
    Query("its only target goes", "b", "x", ("a",)),
    Query("one of two targets goes", "b", "x", ("a", "c")),
    Query("untouched", "b", "x", ("c", "d")),
]


def test_queries_leave_with_the_images_they_need():
    left = benchmark(QUERIES, query_kinds={"untouched": "k", "its reference goes": "k"}).without_images(["a"])
    assert [query.query_id for query in left.queries] == ["one of two targets goes", "untouched"]
    assert left.queries[0].target_ids == ("c",)
    assert left.gallery_ids == GALLERY[1:]
    assert left.query_kinds == {"untouched": "k"}
    told = ("gallery_size", "images_left_out", "queries_left_out")
    assert [left.protocol[key] for key in told] == [5, 1, 2]


def test_an_annotated_target_or_subset_member_takes_its_query_along():
    left = benchmark(QUERIES, recall="first").without_images(["a"])
    assert [query.query_id for query in left.queries] == ["untouched"]
    grouped = [Query("group", "a", "x", ("b",), ("b", "c")), Query("other", "a", "x", ("b",), ("b", "d"))]
    left = benchmark(grouped).without_images(["c", "not one of its images"])
    assert [query.query_id for query in left.queries] == ["other"]
    assert left.protocol["images_left_out"] == 1
    soft = benchmark(QUERIES, recall="soft", soft_targets={"untouched": {"e": 0.5, "c": 1.0}}).without_images(["e"])
    assert soft.soft_targets == {"untouched": {"c": 1.0}}
    aspects = {"negation": frozenset({"untouched", "its reference goes"})}
    left = benchmark(QUERIES, aspects=aspects, aspect_metric="map@2").without_images(["a"])
    assert left.aspects == {"negation": frozenset({"untouched"})}


def test_crops_of_images_that_left_go_with_them():
    crops = {name: Crop(0, 0, 5, 5) for name in "abc"}
    left = benchmark(QUERIES, crops=crops).without_images(["a"])
    assert set(left.crops) == {"b", "c"}


def test_what_is_left_is_scored_and_says_so():
    left = benchmark(QUERIES).without_images(["a"])
    lists = np.array([["c", "b", "d"], ["b", "c", "d"]])
    ranking = Ranking(tuple(q.query_id for q in left.queries), lists, np.tile(np.float32([3, 2, 1]), (2, 1)))
    result = evaluate(ranking, left, num_resamples=100)
    assert result.metrics["recall@1"] == 0.5
    assert result.protocol["queries_left_out"] == 2
    with pytest.raises(CirError, match="0 queries"):
        benchmark(QUERIES).without_images(["a", "c", "d"])


def test_captions_are_read_from_both_formats(tmp_path):
    rows = [{"id": "a", "caption": "a red\ncircle"}, {"id": "b", "caption": ""}, {"id": "7", "caption": "größer"}]
    lines = tmp_path / "captions.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    table = tmp_path / "captions.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    expected = {"a": "a red\ncircle", "b": "", "7": "größer"}
    assert read_captions(str(lines)) == read_captions(str(table)) == expected


def test_captions_are_read_from_any_file_system():
    uri = f"memory://captions-{uuid.uuid4()}/captions.jsonl"
    files.write_bytes(uri, b'{"id": "a", "caption": "x"}\n{"id": "b", "caption": "y"}')
    assert read_captions(uri) == {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a", "caption": "x"}\n{"id": "a", "caption": "y"}', "line 2: image 'a' has a caption already"),
        ('{"id": "a"}', "line 1: 'caption' must be a string"),
        ('{"id": "", "caption": "x"}', "line 1: 'id' must be"),
        ('{"id": "a", "caption": ', "line 1: not a JSON object"),
        ('["a"]', "line 1: expected a JSON object with 'id' and 'caption'"),
        ("\n", "no captions in this file"),
        (b"\xff\xfe{", "line 1: not a JSON object"),
    ],
)
def test_faulty_captions_are_named(tmp_path, content, message):
    path = tmp_path / "captions.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CirError, match=message):
        read_captions(str(path))


def test_faulty_caption_tables_are_named(tmp_path):
    path = tmp_path / "captions.parquet"
    pq.write_table(pa.table({"id": ["a"], "text": ["x"]}), path)
    with pytest.raises(CirError, match="no column 'caption'; it has"):
        read_captions(str(path))
    pq.write_table(pa.table({"id": ["a"], "caption": [None]}), path)
    with pytest.raises(CirError, match="row 1: 'caption' must be a string"):
        read_captions(str(path))


def test_a_composed_gallery_is_slerp_where_there_is_a_caption_and_the_image_elsewhere():
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=(40, 8)).astype(np.float32) for _ in range(2))
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text))
    captioned = torch.from_numpy(rng.random(40) < 0.5)
    found = compose_gallery(image, text, captioned, 0.3)
    expected = slerp(torch.from_numpy(image), torch.from_numpy(text), 0.3)
    assert torch.equal(found[captioned], expected[captioned])
    assert torch.equal(found[~captioned], torch.from_numpy(image)[~captioned])
    pieces = [compose_gallery(image[i : i + 7], text[i : i + 7], captioned[i : i + 7], 0.3) for i in range(0, 40, 7)]
    assert torch.equal(torch.cat(pieces), found)
    assert compose_gallery(image.astype(np.float16), text, captioned, 0.3).dtype == torch.float32
    with pytest.raises(CirError, match="alpha must lie"):
        compose_gallery(image, text, captioned, 1.5)
