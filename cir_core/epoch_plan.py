"""Which samples make which global batch: a seeded, global shuffle that depends on nothing but the shards and the seed.

An epoch is cut in three steps, each known before any image is read:
1. the slices of all shards (runs of consecutive samples that one ranged read fetches) are put in seeded order;
2. that sequence of rows is cut into rounds of `steps_per_round` global batches, what one reader task holds at a time;
3. the rows inside a round are permuted, and dealt out to its steps.

So every sample is in exactly one step, a step's samples do not depend on the number of workers, and the whole state
of an interrupted epoch is one number, the step to go on with: shards consumed before it are not read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cir_core.schema import CirError
from cir_core.shards import ShardIndex, Slice

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Rows [first, stop) of a slice, counted within the slice."""

    slice: Slice
    first: int
    stop: int


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch. Build it with `plan_epoch`.

    slices: in shuffled order. ends: int64[num_slices], rows up to and including each slice.
    """

    slices: tuple[Slice, ...]
    ends: Indices
    global_batch_size: int
    steps_per_round: int
    seed: int
    epoch: int

    @property
    def num_rows(self) -> int:
        """Samples of the epoch."""
        return int(self.ends[-1])

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the epoch; the last may have fewer samples, none are dropped."""
        return -(-self.num_rows // self.global_batch_size)

    @property
    def num_rounds(self) -> int:
        """Reader tasks of the epoch."""
        return -(-self.num_steps // self.steps_per_round)

    def _bounds(self, round_index: int) -> tuple[int, int]:
        size = self.steps_per_round * self.global_batch_size
        return round_index * size, min((round_index + 1) * size, self.num_rows)

    def pieces(self, round_index: int) -> list[Piece]:
        """Return what a round reads, in the order of the rows before they are permuted."""
        first, stop = self._bounds(round_index)
        found = []
        for index in range(int(np.searchsorted(self.ends, first, side="right")), len(self.slices)):
            start = int(self.ends[index]) - self.slices[index].num_rows
            if start >= stop:
                break
            found.append(
                Piece(self.slices[index], max(first - start, 0), min(stop - start, self.slices[index].num_rows))
            )
        return found

    def deal(self, round_index: int, world_size: int) -> list[list[Indices]]:
        """Deal a round's rows out to steps and workers.

        Returns:
            One list per step of the round with `world_size` arrays of row numbers within the round, as even as can
            be. Together they are a permutation of all rows of the round; a step's rows do not depend on world_size.
        """
        first, stop = self._bounds(round_index)
        order = np.random.default_rng([self.seed, self.epoch, 1, round_index]).permutation(stop - first)
        steps = range(0, stop - first, self.global_batch_size)
        return [np.array_split(order[start : start + self.global_batch_size], world_size) for start in steps]


def rows_per_worker(global_batch_size: int, world_size: int) -> int:
    """Return the rows each worker's batch has room for; where a step has fewer, the rest are placeholders."""
    return -(-global_batch_size // world_size)


def plan_epoch(
    indexes: Sequence[ShardIndex], *, global_batch_size: int, steps_per_round: int = 8, seed: int = 0, epoch: int = 0
) -> EpochPlan:
    """Plan an epoch over indexed shards.

    Args:
        indexes: what `shards.index_shard` counted; their order does not matter.
        global_batch_size: samples per optimiser step over all workers.
        steps_per_round: global batches that are shuffled among each other and read by one task; memory of a task is
            about steps_per_round x global_batch_size encoded images.
        seed, epoch: another of either gives another order.

    Raises:
        CirError: no samples, a size below one, or the same shard twice.
    """
    if global_batch_size < 1 or steps_per_round < 1:
        raise CirError(
            f"global_batch_size and steps_per_round must be at least 1, not {global_batch_size} and {steps_per_round}"
        )
    names = [index.shard for index in indexes]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CirError(f"shard {twice} is listed twice; every sample is to be seen once")
    slices = [part for index in sorted(indexes, key=lambda item: item.shard) for part in index.slices]
    if not slices:
        raise CirError(f"the {len(indexes)} shards hold no usable sample; nothing to train on")
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(slices))
    shuffled = tuple(slices[index] for index in order)
    ends = np.cumsum([part.num_rows for part in shuffled], dtype=np.int64)
    return EpochPlan(shuffled, ends, global_batch_size, steps_per_round, seed, epoch)
