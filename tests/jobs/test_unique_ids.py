"""Duplicates of a large store in tasks: what one process finds and writes, whatever the sizes of tasks and ranges."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import ray

from cir_core.embedding_store import EmbeddingWriter, PartInfo, StoreSpec
from cir_core.schema import Reject
from jobs import unique_ids

SPEC = StoreSpec("m", "w", "d", "", "c", "t", "crop", 2, "float32", "i", "fp32")


def write(uri: str, *, different: int) -> EmbeddingWriter:
    """Seven parts with ids drawn from so many, and a reject each."""
    writer = EmbeddingWriter(uri, SPEC)
    random = np.random.default_rng(0)
    for index in range(7):
        ids = [f"ü{number}" for number in random.permutation(different)[: 20 * index]]
        vectors = np.tile(np.array([0, 1], np.float32), (len(ids), 1))
        writer.write_part(index, ids, vectors, rejects=[Reject("s", f"r{index}", "empty")])
    return writer


@pytest.mark.parametrize("most", [1, 50, 1000])
def test_groups_hold_every_part_once(most, monkeypatch):
    monkeypatch.setattr(unique_ids, "_TASK_ROWS", most)
    parts = [PartInfo(index, f"p{index}", rows, 0, "", "", 0, ()) for index, rows in enumerate([3, 0, 49, 60, 1, 1])]
    groups = list(unique_ids._groups(parts))
    assert [part for group in groups for part in group] == parts
    assert all(len(group) == 1 or sum(part.num_rows for part in group) <= most for group in groups)


@pytest.mark.slow
@pytest.mark.parametrize("range_rows", [10_000, 37])
@pytest.mark.parametrize("different", [150, 100_000])
def test_tasks_do_what_one_process_does(servers, tmp_path, monkeypatch, range_rows, different):
    if not ray.is_initialized():
        ray.init(address=servers.ray_address, log_to_driver=False, logging_level="WARNING")
    one = write(str(tmp_path / "one"), different=different)
    shutil.copytree(tmp_path / "one", tmp_path / "many")
    many = EmbeddingWriter(str(tmp_path / "many"), SPEC)
    before = one.finished_parts()
    shards = {index: f"{index}.tar" for index in range(0, 7, 2)}
    expected = one.drop_duplicates(before, shards)
    assert (expected != before) == (different == 150)
    monkeypatch.setattr(unique_ids, "_TASK_ROWS", 50)
    monkeypatch.setattr(unique_ids, "_RANGE_ROWS", range_rows)
    assert unique_ids.drop_duplicates(many, before, shards) == expected == many.finished_parts()
    rows_in = sum(part.num_rows + part.num_rejects for part in before.values())
    many.commit(rows_in=rows_in)  # ids are unique now
