"""The epoch plan: a permutation of all samples, the same for any number of workers, resumable at any step."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cir_core.epoch_plan import plan_epoch, rows_per_worker
from cir_core.schema import CirError
from cir_core.shards import ShardIndex, Slice


def indexes(shard_rows, slice_rows=4):
    """Shards with the given numbers of samples, cut into slices."""
    found = []
    for number, rows in enumerate(shard_rows):
        starts = range(0, rows, slice_rows)
        slices = tuple(Slice(f"s{number}", start, 1, start, min(slice_rows, rows - start)) for start in starts)
        found.append(ShardIndex(f"s{number}", rows, slices, (), 0))
    return found


def steps_of(plan, world_size):
    """Return, per step, the (shard, row) pairs of each worker."""
    steps = []
    for round_index in range(plan.num_rounds):
        rows = [
            (piece.slice.shard, piece.slice.first_row + row)
            for piece in plan.pieces(round_index)
            for row in range(piece.first, piece.stop)
        ]
        for parts in plan.deal(round_index, world_size):
            steps.append([[rows[index] for index in part] for part in parts])
    return steps


shapes = st.lists(st.integers(0, 23), min_size=1, max_size=6).filter(sum)


@given(shapes, st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_every_sample_is_in_exactly_one_step_whatever_the_world_size(shard_rows, batch, per_round, world, seed):
    shards = indexes(shard_rows)
    plan = plan_epoch(shards, global_batch_size=batch, steps_per_round=per_round, seed=seed)
    steps = steps_of(plan, world)
    everything = sorted(sample for step in steps for part in step for sample in part)
    assert everything == sorted((f"s{n}", row) for n, rows in enumerate(shard_rows) for row in range(rows))
    assert len(steps) == plan.num_steps == -(-sum(shard_rows) // batch)
    assert all(len(part) <= rows_per_worker(batch, world) for step in steps for part in step)
    alone = steps_of(plan, 1)
    assert [list(itertools.chain(*step)) for step in steps] == [step[0] for step in alone]
    assert all(sum(map(len, step)) == batch for step in steps[:-1])


def test_order_depends_on_seed_and_epoch_and_not_on_listing_order():
    shards = indexes([40, 40, 40])
    orders = [
        steps_of(plan_epoch(found, global_batch_size=8, seed=seed, epoch=epoch), 1)
        for found, seed, epoch in [(shards, 0, 0), (shards[::-1], 0, 0), (shards, 1, 0), (shards, 0, 1)]
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]


def test_the_shuffle_is_global():
    plan = plan_epoch(indexes([400] * 8), global_batch_size=64, steps_per_round=4)
    first = {shard for part in steps_of(plan, 1)[0] for shard, _ in part}
    assert len(first) >= 6  # of 8 shards in the first batch alone


@pytest.mark.parametrize(
    ("rows", "batch", "message"),
    [([0, 0], 4, "no usable sample"), ([4], 0, "at least 1")],
)
def test_bad_input_is_named(rows, batch, message):
    with pytest.raises(CirError, match=message):
        plan_epoch(indexes(rows), global_batch_size=batch)


def test_a_shard_listed_twice_is_refused():
    with pytest.raises(CirError, match="s0 is listed twice"):
        plan_epoch([*indexes([4]), *indexes([4])], global_batch_size=2)


def test_a_large_plan_is_cheap():
    plan = plan_epoch(indexes([10_000] * 200, slice_rows=256), global_batch_size=1024)
    assert plan.num_rows == 2_000_000
    assert sum(len(part) for part in plan.deal(plan.num_rounds - 1, 7)[-1]) == 2_000_000 % 1024
    assert np.all(np.diff(plan.ends) > 0)
