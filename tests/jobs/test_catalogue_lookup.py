"""Ids of a store, share by share: actors that hold them and tasks that read them agree, also after one was killed."""

from __future__ import annotations

import os
import signal

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.util.state import list_actors

from cir_core.embedding_store import EmbeddingStore, EmbeddingWriter, StoreSpec
from cir_core.schema import Query
from jobs import catalogue_lookup
from jobs.catalogue_lookup import ShareIds, StoreIds

SIZES = [300, 0, 7, 90]
SHARES = [[0], [1, 2], [3]]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("store") / "store")
    writer = EmbeddingWriter(
        uri, StoreSpec("m", "w", "d", "", "c", "t", "crop", 4, "float16", "i", "fp32"), row_group_rows=64
    )
    for index, num_rows in enumerate(SIZES):
        vectors = np.random.default_rng(index).standard_normal((num_rows, 4)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        writer.write_part(index, [f"{index}-{row}" for row in range(num_rows)], vectors)
    writer.commit(rows_in=sum(SIZES))
    return uri


QUERIES = (
    Query(query_id="a", reference_id="3-89", relative_caption="x", subset_ids=("0-5", "2-6")),
    Query(query_id="b", reference_id="0-64", relative_caption="x"),
    Query(query_id="c", reference_id="not there", relative_caption="x"),
)
ROWS = np.array([0, 63, 299, 300, 306, 307, 396], np.int64)


def check(found, names, uri):
    """Of all shares: both references with their embeddings, the members, and every id."""
    opened = EmbeddingStore.open(uri)
    references = [(name, int(row)) for one in found[0::3] for name, row in zip(one.names, one.rows, strict=True)]
    assert references == [("0-64", 64), ("3-89", 396)]
    assert (np.concatenate(found[2::3]) == opened.take(["0-64", "3-89"])).all()
    members = [(name, int(row)) for one in found[1::3] for name, row in zip(one.names, one.rows, strict=True)]
    assert members == [("0-5", 5), ("2-6", 306)]
    assert pa.chunked_array(names, pa.large_string()).to_pylist() == opened.ids_at(ROWS).tolist()


def test_shares_answer_what_they_hold(store):
    shares = [ShareIds(store, share) for share in SHARES]
    for _ in range(2):
        found = [one.look_up(QUERIES) for one in shares]
        answers = [
            part
            for one, (*names, rows) in zip(shares, found, strict=True)
            for part in (*names, one.embeddings_at(rows))
        ]
        check(answers, [one.names_of(ROWS) for one in shares], store)


def test_held_ids_are_read_once(store, monkeypatch):
    reads = []
    real = EmbeddingStore.iter_ids
    monkeypatch.setattr(EmbeddingStore, "iter_ids", lambda self, parts=None: reads.append(parts) or real(self, parts))
    share = ShareIds(store, [0, 2])
    for _ in range(3):
        share.look_up(QUERIES)
        share.names_of(ROWS)
    assert sorted(reads) == [[0], [2]]


def test_a_task_reads_the_parts_that_hold_a_row(store, monkeypatch):
    reads = []
    real = EmbeddingStore.iter_ids
    monkeypatch.setattr(EmbeddingStore, "iter_ids", lambda self, parts=None: reads.append(parts) or real(self, parts))
    names = catalogue_lookup._names_of._function(store, [0, 2], np.array([1, 299, 396], np.int64))
    assert names.to_pylist() == ["0-1", "0-299"]
    assert reads == [[0]]


@pytest.mark.slow
def test_actors_and_tasks_agree_and_a_killed_actor_comes_again(servers, store, monkeypatch):
    if not ray.is_initialized():
        ray.init(address=servers.ray_address, log_to_driver=False, logging_level="WARNING")
    tasks = StoreIds(store, SHARES, num_tiles=9)
    assert not tasks.actors  # a small store
    check(ray.get(tasks.look_up(QUERIES)), ray.get(tasks.names_of(ROWS)), store)
    monkeypatch.setattr(catalogue_lookup, "_ACTOR_ROWS", 0)
    assert not StoreIds(store, SHARES, num_tiles=1).actors
    held = StoreIds(store, SHARES, num_tiles=2)
    assert len(held.actors) == len(SHARES)
    check(ray.get(held.look_up(QUERIES)), ray.get(held.names_of(ROWS)), store)
    alive = [actor for actor in list_actors(filters=[("state", "=", "ALIVE")]) if actor.class_name == "ShareIds"]
    assert len(alive) == len(SHARES)
    os.kill(alive[0].pid, signal.SIGKILL)
    check(ray.get(held.look_up(QUERIES)), ray.get(held.names_of(ROWS)), store)
    holders = [catalogue_lookup._Actor.remote(store, share) for share in SHARES]
    check(
        ray.get(StoreIds(store, SHARES, num_tiles=1, holders=holders).look_up(QUERIES)),
        ray.get(held.names_of(ROWS)),
        store,
    )
    held.close()
