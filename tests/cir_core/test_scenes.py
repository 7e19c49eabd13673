"""Scenes: seeded, whole, and impossible to solve with one half of a query."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cir_core.benchmarks import load_benchmark
from cir_core.scenes import compose_query, describe, encode_image, random_scene, render, write_benchmark, write_pairs
from cir_core.scenes.model import MAX_OBJECTS, Scene, SceneObject, seeded
from cir_core.scenes.queries import KINDS
from cir_core.schema import CirError
from cir_core.shards import Sample, read_shard


@given(st.integers())
def test_scenes_keep_their_rules(seed):
    scene = random_scene(seeded("test", seed))
    assert 1 <= len(scene.objects) <= MAX_OBJECTS
    assert (
        len({item.shape for item in scene.objects}) == len({item.place for item in scene.objects}) == len(scene.objects)
    )
    assert Scene(scene.background, tuple(reversed(scene.objects))) == scene


def test_a_scene_refuses_objects_that_could_be_confused():
    one = SceneObject("circle", "red", "small", "top")
    with pytest.raises(ValueError, match="different shapes"):
        Scene("white", (one, SceneObject("circle", "blue", "large", "left")))


@given(st.integers(), st.sampled_from(KINDS))
def test_a_query_needs_both_halves(seed, kind):
    query = compose_query(seeded("query", seed), kind)
    assert query.target != query.reference
    assert query.relative_caption
    for distractor in (*query.image_distractors, *query.text_distractors):
        assert distractor != query.target
    common = set(query.reference.objects) & set(query.target.objects)
    assert common or len(query.reference.objects) == 1  # the target keeps what the sentence leaves alone
    counts = {"add": 1, "remove": -1}.get(kind, 0)
    assert len(query.target.objects) - len(query.reference.objects) == counts


@given(st.integers())
def test_captions_name_only_what_is_there(seed):
    rng = seeded("caption", seed)
    scene = random_scene(rng)
    caption = describe(scene, rng)
    colours = {item.colour for item in scene.objects}
    assert any(colour in caption for colour in colours)
    for colour in {"red", "green", "blue", "purple", "cyan"} - colours - {scene.background}:
        assert f" {colour} " not in f" {caption} "


def test_pictures_are_seeded_and_jittered():
    scene = random_scene(seeded("picture", 1))
    first, again, other = (encode_image(render(scene, seeded("jitter", n))) for n in (1, 1, 2))
    assert first == again != other
    assert np.asarray(Image.open(io.BytesIO(first))).shape == (64, 64, 3)


@pytest.mark.parametrize("shard_format", ["tar", "parquet"])
def test_pairs_come_back_from_their_shards(tmp_path, shard_format):
    shards = write_pairs(str(tmp_path / "a"), 25, seed=3, shard_rows=10, shard_format=shard_format)
    rows = [row for shard in shards for row in read_shard(shard)]
    assert len(shards) == 3
    assert [row.key for row in rows] == [f"{index:09d}" for index in range(25)]
    assert all(isinstance(row, Sample) and row.caption for row in rows)
    again = write_pairs(str(tmp_path / "b"), 25, seed=3, shard_rows=10, shard_format=shard_format)
    digests = [[hashlib.sha256(Path(shard).read_bytes()).digest() for shard in names] for names in (shards, again)]
    assert digests[0] == digests[1]


def test_the_benchmark_folder_loads_and_its_targets_show_the_target(tmp_path):
    write_benchmark(str(tmp_path), "val", 24, seed=5)
    benchmark = load_benchmark("scenes", str(tmp_path), split="val")
    assert len(benchmark.queries) == 24
    assert len(benchmark.gallery_ids) == 24 * 11
    assert set(benchmark.query_kinds.values()) == set(KINDS)
    stored = [row.key for shard in sorted((tmp_path / "val" / "gallery").iterdir()) for row in read_shard(str(shard))]
    assert tuple(stored) == benchmark.gallery_ids
    lines = [json.loads(line) for line in (tmp_path / "val" / "queries.jsonl").read_text().splitlines()]
    assert [line["target_ids"] for line in lines] == [list(query.target_ids) for query in benchmark.queries]


def test_splits_and_seeds_differ(tmp_path):
    folders = [
        write_benchmark(str(tmp_path / str(seed)), split, 8, seed=seed) for split in ("val", "test") for seed in (0, 1)
    ]
    texts = {Path(folder, "queries.jsonl").read_text() for folder in folders}
    assert len(texts) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: write_pairs(path, 0), "at least 1"),
        (lambda path: write_pairs(path, 5, shard_format="zip"), "'zip'"),
        (lambda path: write_benchmark(path, "val", 0), "at least 1"),
    ],
)
def test_bad_requests_are_named(tmp_path, call, message):
    with pytest.raises(CirError, match=message):
        call(str(tmp_path))
