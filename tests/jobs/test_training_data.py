"""The training pipeline on real Ray Data: every worker gets its part of every step, in order, from any step on."""

import itertools
import threading

import pytest
import ray

from cir_core.preprocessing import Preprocessing
from cir_core.scenes import write_pairs
from cir_core.shards import index_shard, write_tar_shard
from jobs.training_data import PlannedBatches, RunPlan, index_shards, worker_batches

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROWS, BATCH = 203, 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    found = write_pairs(str(folder), ROWS - 3, shard_rows=70)
    bad = [(f"bad{n}", b"<html>", "jpg", f"broken {n}") for n in range(3)]
    write_tar_shard(str(folder / "00009.tar"), bad)
    return [*found, str(folder / "00009.tar")]


@pytest.fixture(scope="module")
def connected(servers):
    if not ray.is_initialized():
        ray.init(address=servers.ray_address, log_to_driver=False, logging_level="WARNING")


def deliver(plan, world_size, first_step):
    """Run the pipeline and return, for each worker, its (step, keys, valid keys, rejects)."""
    data = PlannedBatches(plan, Preprocessing(32), lambda: first_step)
    splits = data.configure({"train": None}, world_size)
    found = [[] for _ in range(world_size)]
    failures = []

    def consume(rank):
        try:
            for step, (arrays, info) in enumerate(worker_batches(splits[rank]["train"], first_step), start=first_step):
                assert arrays["images"].shape == (-(-BATCH // world_size), 3, 32, 32)
                readable = [key for key, valid in zip(info["key"], arrays["valid"], strict=False) if valid]
                found[rank].append((step, info["key"], readable, [reject["key"] for reject in info["rejects"]]))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=consume, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failures
    return found


def test_workers_share_every_step_and_resume_anywhere(connected, shards):
    plan = RunPlan(
        tuple(index_shard(shard, slice_rows=16) for shard in shards), BATCH, seed=1, epochs=2, steps_per_round=4
    )
    steps = plan.epoch(0).num_steps
    alone = deliver(plan, 1, 0)[0]
    assert [step for step, *_ in alone] == list(range(2 * steps))
    for epoch in range(2):
        keys = [key for _, keys, *_ in alone[epoch * steps : (epoch + 1) * steps] for key in keys]
        assert len(keys) == len(set(keys)) == ROWS
    assert [keys for _, keys, *_ in alone[:steps]] != [keys for _, keys, *_ in alone[steps:]]
    assert sorted(key for row in alone for key in row[3]) == sorted(["bad0", "bad1", "bad2"] * 2)
    assert sum(len(row[2]) for row in alone) == 2 * (ROWS - 3)

    for world_size, first in ((3, 0), (2, 5), (1, steps + 2)):
        parts = deliver(plan, world_size, first)
        for offset, (_, keys, *_) in enumerate(alone[first:]):
            assert list(itertools.chain(*(part[offset][1] for part in parts))) == keys


def test_counts_are_kept_between_runs(connected, shards, tmp_path):
    first = index_shards(shards, str(tmp_path))
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(stored) == len(shards)
    assert index_shards(shards, str(tmp_path)) == first == [index_shard(shard) for shard in shards]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == stored
