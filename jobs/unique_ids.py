"""Ids that occur twice in a large store, found and dropped by Ray tasks: the driver sees no id that occurs once.

Hashes of all ids, 8 bytes each, go between tasks as objects, cut into ranges of values: who compares a range gets nothing of
the others. At a billion rows that is 8 GB through the cluster, where one process would take 25 GB of memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import ray

from cir_core.embedding_store import EmbeddingWriter, PartInfo, ids_with, later_ones, part_hashes, repeated

Hashes = npt.NDArray[np.uint64]
_TASK_ROWS = 2_000_000  # ids that one task reads, and a store that one process checks
_RANGE_ROWS = 16_000_000  # hashes that one task compares: 128 MB, and as much again to sort them


def drop_duplicates(
    writer: EmbeddingWriter, parts: Mapping[int, PartInfo], shards: Mapping[int, str] | None = None
) -> dict[int, PartInfo]:
    """Do what `EmbeddingWriter.drop_duplicates` does, of a large store in tasks."""
    num_rows = sum(part.num_rows for part in parts.values())
    if num_rows <= _TASK_ROWS:
        return writer.drop_duplicates(parts, shards)
    groups = list(_groups([part for _, part in sorted(parts.items())]))
    count = max(2, -(-num_rows // _RANGE_ROWS))
    bounds = [(number << 64) // count for number in range(1, count)]
    hashed = [_hashes.options(num_returns=count).remote(writer, group, bounds) for group in groups]
    suspects = np.concatenate(ray.get([_repeated.remote(*ranges) for ranges in zip(*hashed, strict=True)]))
    if not len(suspects):
        return dict(parts)
    shared = ray.put(suspects)
    named = ray.get([_suspected.remote(writer, group, shared) for group in groups])
    found = later_ones(itertools.chain.from_iterable(named))
    names = shards or {}
    written = ray.get([_without.remote(writer, parts[one], rows, names.get(one)) for one, rows in found.items()])
    return {**parts, **{part.index: part for part in written}}


def _groups(parts: Sequence[PartInfo]) -> Iterator[list[PartInfo]]:
    """Cut parts into runs of about _TASK_ROWS rows, at least one part each."""
    group: list[PartInfo] = []
    for part in parts:
        if group and sum(one.num_rows for one in group) + part.num_rows > _TASK_ROWS:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


@ray.remote(num_cpus=1, max_retries=5)
def _hashes(writer: EmbeddingWriter, parts: list[PartInfo], bounds: Sequence[int]) -> list[Hashes]:
    """Return the hashes of the parts' ids, rising, an array for each range of values between the bounds."""
    store = writer.uncommitted(parts)
    everything = np.sort(np.concatenate([part_hashes(store, part.index) for part in parts]))
    return np.split(everything, np.searchsorted(everything, np.array(bounds, np.uint64)))


@ray.remote(num_cpus=1, max_retries=5)
def _repeated(*hashes: Hashes) -> Hashes:
    return repeated(hashes)


@ray.remote(num_cpus=1, max_retries=5)
def _suspected(writer: EmbeddingWriter, parts: list[PartInfo], suspects: Hashes) -> list[tuple[int, list[str]]]:
    """Return, by part, the ids that have one of these hashes."""
    store = writer.uncommitted(parts)
    found = [(part.index, ids_with(store, part.index, suspects)) for part in parts]
    return [(index, ids) for index, ids in found if ids]


@ray.remote(num_cpus=1, max_retries=5)
def _without(writer: EmbeddingWriter, part: PartInfo, rows: list[tuple[str, int]], shard: str | None) -> PartInfo:
    return writer.without(part, rows, shard)
