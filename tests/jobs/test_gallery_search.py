"""Shards as tasks and as actors: equal to one search in this process, also when a shard is killed."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest
import ray
import torch
from ray.util.state import list_actors

from cir_core.composition import query_weights
from cir_core.embedding_store import EmbeddingStore, EmbeddingWriter, StoreSpec
from cir_core.schema import CirError
from cir_core.search import weighted_top_k
from jobs import gallery_search, session
from jobs.gallery_search import Gallery, GallerySearch, Shard, Tile, threads_of

SETTINGS = [("slerp", 0.5), ("sum", None)]
K = 7


def unit(*shape, seed):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Five parts of very different sizes, one of them empty."""
    uri = str(tmp_path_factory.mktemp("store") / "store")
    writer = EmbeddingWriter(
        uri, StoreSpec("ViT-Tiny", "ours", "w" * 8, "", "c", "t", "crop", 24, "float16", "input", "fp32")
    )
    sizes = [700, 0, 13, 2000, 1]
    for index, num_rows in enumerate(sizes):
        ids = [f"{index}-{row}" for row in range(num_rows)]
        writer.write_part(index, ids, unit(num_rows, 24, seed=index).numpy())
    writer.commit(rows_in=sum(sizes))
    return uri


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Four parts of 20 rows, every row with a caption."""
    uri = str(tmp_path_factory.mktemp("captioned") / "store")
    writer = EmbeddingWriter(
        uri, StoreSpec("ViT-Tiny", "ours", "w" * 8, "", "c", "t", "crop", 24, "float16", "input", "fp32")
    )
    for index in range(4):
        ids, images, texts = (
            [f"{index}-{row}" for row in range(20)],
            *(unit(20, 24, seed=seed + index) for seed in (0, 9)),
        )
        writer.write_part(index, ids, images.numpy(), columns={"caption": ids}, caption_embeddings=texts.numpy())
    writer.commit(rows_in=80)
    return uri


@pytest.fixture(scope="module")
def connected(servers):
    if not ray.is_initialized():
        ray.init(address=servers.ray_address, log_to_driver=False, logging_level="WARNING")


@pytest.fixture(scope="module")
def tile():
    return Tile(unit(5, 24, seed=1), unit(5, 24, seed=2), [3, -1, 700, 2713, 9])


def expected(uri, tile, rows=None):
    gallery = np.concatenate([block.embeddings for block in EmbeddingStore.open(uri).iter_blocks()])
    weights = {key: query_weights(key[0], tile.images, tile.texts, key[1]) for key in SETTINGS}
    return weighted_top_k(tile.images, tile.texts, gallery if rows is None else gallery[rows], weights, K, tile.exclude)


def check(found, uri, tile, rows=None):
    for key, top in expected(uri, tile, rows).items():
        assert torch.equal(found[key].indices, top.indices)
        assert torch.equal(found[key].scores, top.scores)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("memory_gb", [1.0, 1e-6])
def test_a_shard_that_holds_its_rows_and_one_that_streams_them_agree(store, tile, keep, memory_gb):
    shard = Shard(Gallery(store), [0, 1, 2, 3, 4], memory_gb, keep=keep)
    assert shard.keep == (keep and memory_gb == 1.0)
    for _ in range(2):
        check(shard.search(tile, SETTINGS, K), store, tile)


def test_a_gallery_of_some_rows(store, tile):
    rows = np.array([0, 5, 699, 700, 712, 2713])
    some = Gallery(store, rows)
    check(Shard(some, some.parts(), 1.0, keep=True).search(tile, SETTINGS, K), store, tile, rows)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_shard_says_the_embeddings_of_its_rows_as_they_are_in_the_store(captioned, tile, keep, alpha, monkeypatch):
    shard = Shard(Gallery(captioned, alpha=alpha), [1, 3], 1.0, keep=keep)
    rows = np.array([27, 61, 20, 79, 27])
    expected = EmbeddingStore.open(captioned).embeddings_at(rows)
    reads = []
    real = EmbeddingStore.embeddings_at
    monkeypatch.setattr(EmbeddingStore, "embeddings_at", lambda self, rows: reads.append(1) or real(self, rows))
    outside = Tile(tile.images, tile.texts, [-1] * 5)
    for number in range(2):  # the second time it may hold its share
        found = shard.embeddings_at(rows)
        assert found.dtype == expected.dtype
        assert (found == expected).all()
        assert shard.embeddings_at(rows[:0]).shape == (0, 24)
        assert len(reads) == (2 if number == 0 else 0 if keep and not alpha else 2)
        reads.clear()
        shard.search(outside, SETTINGS, 3)


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [3])
def test_any_number_of_shards_and_killed_ones_give_the_same_lists(connected, store, tile, num_shards, monkeypatch):
    monkeypatch.setattr(gallery_search, "_ACTOR_BYTES", 0)
    search = GallerySearch(Gallery(store), num_shards)
    assert len(search.actors) == num_shards
    check(ray.get(search.start(tile, SETTINGS, K)), store, tile)
    actors = [actor for actor in list_actors(filters=[("state", "=", "ALIVE")]) if actor.class_name == "Shard"]
    os.kill(actors[0].pid, signal.SIGKILL)
    check(ray.get(search.start(tile, SETTINGS, K)), store, tile)
    every = np.arange(2714)
    own = np.split(every, [713, 2713])  # parts 0 and 2, part 3, part 4
    vectors = [actor.embeddings_at.remote(rows) for actor, rows in zip(search.actors, own, strict=True)]
    assert (np.concatenate(ray.get(vectors)) == EmbeddingStore.open(store).embeddings_at(every)).all()
    tasks = GallerySearch(Gallery(store), num_shards, num_tiles=1)
    assert not tasks.actors
    check(ray.get(tasks.start(tile, SETTINGS, K)), store, tile)


@pytest.mark.parametrize(
    ("num_shares", "cpus", "own", "fitting", "threads"),
    [
        (8, [0, *[16] * 8], 16, math.inf, 16),
        (2, [2], 2, math.inf, 1),
        (1, [8], 8, math.inf, 8),
        (9, [0, 16, 16], 16, math.inf, 3),
        (4, [16, 8], 16, math.inf, 8),
        (40, [4], 4, math.inf, 1),
        (86, [0, 16], 16, 1, 16),  # the first node of many that are still to come
        (86, [0, 16], 16, 0, 16),
        (3, [0], 0, math.inf, 1),
    ],
)
def test_a_share_has_its_part_of_a_node_s_cpus(num_shares, cpus, own, fitting, threads):
    assert threads_of(num_shares, cpus, own, fitting) == threads


def nodes(*memory):
    return lambda: [{"Alive": True, "Resources": {"CPU": 2.0, "memory": size}} for size in memory]


@pytest.mark.parametrize(
    ("sizes", "memory", "limit", "outcome"),
    [
        ([10, 10, 10], [25, 10], 0, None),
        ([0, 0], [0], 0, None),
        ([10, 10, 10], [29, 9], 0, "do not fit"),  # in sum they would
        ([10], [], 0, "do not fit"),
        ([10, 10, 10], [29, 9], 100, "has to grow"),
    ],
)
def test_shares_that_do_not_fit_are_told_before_work_starts(sizes, memory, limit, outcome, monkeypatch, capsys):
    monkeypatch.setattr(session.ray, "nodes", nodes(*memory))
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 2.0 * len(memory)})
    monkeypatch.setattr(session, "_autoscaler_limit", lambda: {"CPU": limit})
    if outcome == "do not fit":
        with pytest.raises(CirError, match="shares do not fit"):
            session.check_memory(sizes)
    else:
        session.check_memory(sizes)
    assert ("has to grow" in capsys.readouterr().out) == (outcome == "has to grow")


@pytest.mark.slow
def test_a_held_share_reserves_its_memory(connected, store, tile, monkeypatch):
    monkeypatch.setattr(gallery_search, "_ACTOR_BYTES", 0)
    monkeypatch.setattr(gallery_search, "_HELD_BYTES", 20_000)  # 1.3 GB in all
    search = GallerySearch(Gallery(store), 2)
    check(ray.get(search.start(tile, SETTINGS, K)), store, tile)
    own = {actor._actor_id.hex() for actor in search.actors}
    shown = [actor for actor in list_actors(detail=True, limit=10_000) if actor.actor_id in own]
    assert sum(actor.required_resources["memory"] for actor in shown) == 2714 * 24 * 20_000
    monkeypatch.setattr(gallery_search, "_HELD_BYTES", 20_000_000)
    with pytest.raises(CirError, match="shares do not fit"):
        GallerySearch(Gallery(store), 2, memory_gb=1e6)
