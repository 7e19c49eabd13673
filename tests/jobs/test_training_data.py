"""The training pipeline on real Ray Data: every worker gets its part of every step, in order, from any step on."""

import itertools
import shutil
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.data import ExecutionResources

from cir_core.encoders import load_encoder
from cir_core.epoch_plan import EpochPlan, plan_epoch
from cir_core.preprocessing import Preprocessing
from cir_core.scenes import write_pairs
from cir_core.shards import ShardIndex, index_shard, read_captions, write_tar_shard
from jobs import session
from jobs.models import ModelInfo
from jobs.text_anchors import anchor_spec, make_anchors
from jobs.training_data import PlannedBatches, RunPlan, index_shards, steps_in_memory, worker_batches

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


@pytest.fixture(scope="module")
def text_anchors(connected, shards, tiny_model_dir, tmp_path_factory):
    model = f"local-dir:{tiny_model_dir}"
    encoder = load_encoder(model, device="cpu")
    info = ModelInfo(model, None, None, encoder.details, encoder.preprocessing)
    indexes = [index_shard(shard, slice_rows=16) for shard in shards]
    return make_anchors(
        indexes,
        info,
        anchor_spec(encoder.details, "fp32", shards),
        storage_uri=str(tmp_path_factory.mktemp("storage")),
        num_actors=(1, 1),
        cpus_per_actor=0.5,
        use_gpu=False,
    )


def deliver(plan, world_size, first_step, anchors=None):
    """Run the pipeline and return, for each worker, its (step, keys, valid keys, rejects).

    anchors: filled with each key's anchor, where the plan has them.
    """
    data = PlannedBatches(plan, Preprocessing(32), lambda: first_step)
    splits = data.configure({"train": None}, world_size)
    found = [[] for _ in range(world_size)]
    failures = []

    def consume(rank):
        try:
            for step, (arrays, info) in enumerate(worker_batches(splits[rank]["train"], first_step), start=first_step):
                assert arrays["images"].shape == (-(-BATCH // world_size), 3, 32, 32)
                if anchors is not None:
                    assert "texts" not in info
                    assert not arrays["anchors"][len(info["key"]) :].any()
                    anchors.update(zip(info["key"], arrays["anchors"].copy(), strict=False))
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


@pytest.mark.long
def test_anchors_travel_with_their_images(shards, text_anchors, tiny_model_dir):
    indexes = tuple(index_shard(shard, slice_rows=16) for shard in shards)
    plan = RunPlan(indexes, BATCH, seed=1, epochs=1, steps_per_round=4)
    with_anchors = replace(plan, anchors=text_anchors)
    captions = dict(pair for shard in shards for pair in read_captions(shard))
    wanted = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu").encode_texts(list(captions.values())).numpy()
    for world_size, first in ((1, 0), (3, 5)):
        found = {}
        assert deliver(with_anchors, world_size, first, found) == deliver(plan, world_size, first)
        assert len(found) == (ROWS if first == 0 else ROWS - first * BATCH)
        for key, vector in zip(captions, wanted, strict=True):
            assert key not in found or np.abs(found[key] - vector).max() < 1e-6


@pytest.mark.parametrize(
    "moment", [pytest.param("while a round is read", marks=pytest.mark.long), "while its rows are given out"]
)
def test_a_network_failure_in_a_reader_neither_loses_nor_doubles_a_sample(connected, shards, tmp_path, moment):
    indexes = tuple(index_shard(shard, slice_rows=16) for shard in shards)
    plan = RunPlan(indexes, BATCH, seed=1, epochs=1, steps_per_round=4)

    def fail_twice(round_index):
        for number in range(2):
            try:
                (tmp_path / f"{round_index}-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            raise OSError("connection reset by peer")

    class FailingSteps(list):
        round_index = 0

        def __iter__(self):
            yield from list.__iter__(self[:2])
            fail_twice(self.round_index)
            yield from list.__iter__(self[2:])

    class FailingEpoch(EpochPlan):
        def pieces(self, round_index):
            if moment == "while a round is read":
                fail_twice(round_index)
            return super().pieces(round_index)

        def deal(self, round_index, world_size):
            steps = FailingSteps(super().deal(round_index, world_size))
            steps.round_index = round_index
            return steps if moment == "while its rows are given out" else list(steps[:])

    class FailingPlan(RunPlan):
        def epoch(self, epoch):
            whole = plan_epoch(self.indexes, global_batch_size=BATCH, steps_per_round=4, seed=self.seed, epoch=epoch)
            return FailingEpoch(**{field.name: getattr(whole, field.name) for field in fields(whole)})

    wanted = deliver(plan, 2, 1)
    assert deliver(FailingPlan(indexes, BATCH, seed=1, epochs=1, steps_per_round=4), 2, 1) == wanted
    assert len(list(tmp_path.iterdir())) == 2 * plan.epoch(0).num_rounds


def test_a_mistake_in_a_reader_is_not_repeated(connected, shards, tmp_path):
    """The shard was changed since it was counted: a CirError at once, by that name."""
    copied = [str(tmp_path / Path(shard).name) for shard in shards]
    for shard, copy in zip(shards, copied, strict=True):
        shutil.copy(shard, copy)
    plan = RunPlan(tuple(index_shard(shard, slice_rows=16) for shard in copied), BATCH, seed=1, epochs=1)
    shutil.copy(shards[-1], copied[0])
    (split,) = PlannedBatches(plan, Preprocessing(32), lambda: 0).configure({"train": None}, 1)
    with pytest.raises(Exception, match="the shard was changed since it was indexed"):
        list(worker_batches(split["train"], 0))


def test_a_round_of_large_images_has_fewer_steps():
    """64 MiB a step: 8 of them fit. Eight times the bytes a sample, then so many that not one step fits."""
    sizes = {64 << 10: 8, 512 << 10: 2, 4 << 20: 1}
    for bytes_per_sample, steps in sizes.items():
        indexes = [ShardIndex(f"{n}.tar", 100, (), (), 100 * bytes_per_sample) for n in range(3)]
        assert steps_in_memory(indexes, 1024) == steps
    assert steps_in_memory([ShardIndex("a.tar", 0, (), (), 0)], 16) == 8


def test_a_pipeline_that_waits_for_training_leaves_the_processor_alone(connected):
    """Without its pace, Ray Data's loop makes a thousand steps a second while the one task has more than may be taken."""
    steps = []

    class Counts(session.Paced):
        def on_execution_step(self, executor):
            steps.append(time.monotonic())

    def blocks(batch):
        for _ in range(60):
            yield {"image": [b"0" * 1_000_000]}

    dataset = ray.data.from_items([{"id": 0}]).map_batches(blocks, num_cpus=0.5)
    dataset.context.target_max_block_size = 1
    dataset.context.execution_options.resource_limits = ExecutionResources(object_store_memory=10_000_000)
    dataset.context.custom_execution_callback_classes.append(Counts)
    session.pace(dataset)
    rows = iter(dataset.iter_rows())
    next(rows)
    time.sleep(2)  # it fills what it may fill
    before = len(steps)
    time.sleep(2)
    made = len(steps) - before
    assert sum(1 for _ in rows) == 59
    assert 2 <= made <= 2 / 0.05 + 1
