"""The campaign's comparison finds what it is there to find: each kind of damage to a store or to a tuning run."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checks import compare_stores, compare_trainings
from safetensors.numpy import save_file

from cir_core.embedding_store import EmbeddingWriter, StoreSpec
from cir_core.schema import Reject

SPEC = StoreSpec("m", "w", "", "", "", "", "p", 4, "float32", "listing", "fp32")
ROWS = [("a", "b", "c"), ("d", "e")]
REJECTS = [[], [Reject("1.tar", "broken", "decode", "cut")]]


def store(uri, rows=ROWS, rejects=REJECTS, captions="caption of ", seed=0):
    writer = EmbeddingWriter(str(uri), SPEC)
    rng = np.random.default_rng(seed)
    for index, (ids, found) in enumerate(zip(rows, rejects, strict=True)):
        vectors = rng.normal(size=(len(ids), 4)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        writer.write_part(index, ids, vectors, columns={"caption": [captions + one for one in ids]}, rejects=found)
    writer.commit(rows_in=sum(map(len, rows)) + sum(map(len, rejects)), check_unique_ids=False)
    return str(uri)


@pytest.fixture
def expected(tmp_path):
    return store(tmp_path / "expected")


def test_equal_stores_are_equal(tmp_path, expected):
    check = compare_stores(expected, store(tmp_path / "same"))
    assert check.ok
    assert (check.rows, check.lost, check.duplicates) == (6, 0, 0)


@pytest.mark.parametrize(
    ("changed", "lost", "duplicates", "problem"),
    [
        ({"rows": [("a", "b"), ("d", "e")]}, 1, 0, "column id"),
        ({"rows": [("a", "b", "c"), ("d", "e", "a")]}, 0, 1, "column id"),
        ({"rows": [("a", "b", "c"), ("d", "x")]}, 1, 0, "1 rows that the fault-free run has not, such as x"),
        ({"rows": [("a", "c", "b"), ("d", "e")]}, 0, 0, "column id"),
        ({"rejects": [[], []]}, 1, 0, "the rejects differ"),
        ({"rejects": [[], REJECTS[1] * 2]}, 0, 1, "the rejects differ"),
        ({"captions": "other "}, 0, 0, "column caption"),
        ({"seed": 1}, 0, 0, "column embedding"),
    ],
)
def test_each_difference_of_stores_is_found(tmp_path, expected, changed, lost, duplicates, problem):
    check = compare_stores(expected, store(tmp_path / "other", **changed))
    assert not check.ok
    assert (check.lost, check.duplicates) == (lost, duplicates)
    assert any(problem in one for one in check.problems)


def test_a_store_that_is_damaged_or_not_committed_is_found(tmp_path, expected):
    uri = store(tmp_path / "damaged")
    part = tmp_path / "damaged" / "part-00001.parquet"
    table = pq.read_table(part)
    pq.write_table(table.set_column(0, "id", pa.array(["d", "f"])), part)
    assert any("part-00001: checksum" in one for one in compare_stores(expected, uri).problems)
    (tmp_path / "damaged" / "manifest.json").unlink()
    assert any("not committed" in one for one in compare_stores(expected, uri).problems)


def training(folder, samples=((0, "s", "a"), (0, "s", "b"), (1, "s", "c")), steps=2, loss=1.0, weight=0.5):
    (folder / "samples").mkdir(parents=True)
    (folder / "adapter").mkdir()
    table = pa.table({name: [row[i] for row in samples] for i, name in enumerate(("step", "shard", "key"))})
    pq.write_table(table, folder / "samples" / "00000.parquet")
    save_file({"w": np.full(3, weight, np.float32)}, folder / "adapter" / "adapter_model.safetensors")
    history = [{"step": step, "loss": loss} for step in range(steps)]
    counts = {"samples_seen": len(samples), "rejects_images": 0, "rejects_structural": 0}
    (folder / "result.json").write_text(json.dumps({"steps": steps, "history": history, **counts}))
    return str(folder)


@pytest.mark.parametrize(
    ("changed", "lost", "duplicates", "problem"),
    [
        ({}, 0, 0, None),
        ({"samples": ((0, "s", "a"), (0, "s", "b"))}, 1, 0, "samples_seen"),
        ({"samples": ((0, "s", "a"), (0, "s", "b"), (1, "s", "c"), (1, "s", "c"))}, 0, 1, "samples_seen"),
        ({"samples": ((0, "s", "a"), (1, "s", "b"), (1, "s", "c"))}, 1, 0, "the fault-free run has not"),
        ({"steps": 3}, 0, 0, "steps: 3"),
        ({"loss": 1.1}, 0, 0, "losses"),
        ({"weight": 0.6}, 0, 0, "the adapter differs by 0.1"),
    ],
)
def test_each_difference_of_tuning_runs_is_found(tmp_path, changed, lost, duplicates, problem):
    check = compare_trainings(training(tmp_path / "expected"), training(tmp_path / "found", **changed))
    assert (check.lost, check.duplicates) == (lost, duplicates)
    assert check.ok == (problem is None)
    assert problem is None or any(problem in one for one in check.problems)


def test_a_run_without_a_result_is_found(tmp_path):
    (tmp_path / "none").mkdir()
    check = compare_trainings(training(tmp_path / "expected"), str(tmp_path / "none"))
    assert any("result.json" in one for one in check.problems)
