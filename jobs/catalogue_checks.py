"""What is checked of a catalogue's queries before work starts: every row, ids that are unique, images that exist.

Files are checked by a task each. Names travel as 64-bit hashes, sorted: 8 bytes a name, and two that agree by chance cost a
second look (ids of queries) or are seen when the image is looked up (images of the gallery).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from cir_core import files
from cir_core.benchmarks import QueryCounts, QueryFilePlan, QuerySlice, plan_query_file, read_query_slice
from cir_core.benchmarks.custom import check_answerable, is_picture
from cir_core.embedding_store import EmbeddingStore, hash_ids, listing_digest
from cir_core.schema import CirError, Query

Hashes = npt.NDArray[np.uint64]
_BUCKET = 1 << 23  # query ids that one task compares: 64 MB
_SHOWN = 5
_SUSPECTS = 1000


@dataclass(frozen=True)
class CheckedQueries:
    """All parts in order, what the queries have, and a digest of them all, whatever their files are called."""

    parts: list[QuerySlice]
    counts: QueryCounts
    digest: str


def check_queries(
    uris: Sequence[str], store: EmbeddingStore, *, part_rows: int, reference_removed: bool
) -> CheckedQueries:
    """Check all queries files against each other and the store.

    Raises:
        CirError: naming file, line or row, and query.
    """
    found = [_check_file.remote(uri, part_rows, reference_removed) for uri in uris]
    plans: list[QueryFilePlan] = ray.get([plan for plan, _, _ in found])
    counts = QueryCounts.total(plan.counts for plan in plans)
    _ = counts.have_targets, counts.have_subsets  # raise where only some have them
    if len(plans) > 1:
        _refuse_shared_ids(plans, [ids for _, ids, _ in found], counts.num_queries)
    _refuse_missing_images(plans, [wanted for _, _, wanted in found], store)
    digest = listing_digest((plan.digest, plan.counts.num_queries, 0) for plan in plans)
    return CheckedQueries([part for plan in plans for part in plan.slices], counts, digest)


@ray.remote(num_cpus=1, max_retries=5, num_returns=3)
def _check_file(uri: str, part_rows: int, reference_removed: bool) -> tuple[QueryFilePlan, Hashes, Hashes]:
    """Check every row; return the plan, the hashes of the query ids and of the images that the store must hold, sorted."""
    ids: list[Hashes] = []
    wanted: list[Hashes] = []

    def visit(queries: Sequence[Query]) -> None:
        for query in queries:
            try:
                check_answerable(query, reference_removed=reference_removed)
            except CirError as error:
                raise CirError(f"{files.redact(uri)}: {error}") from None
        ids.append(_hashed([query.query_id for query in queries]))
        wanted.append(np.unique(_hashed([name for query in queries for _, name in _needed(query)])))

    plan = plan_query_file(uri, part_rows, visit=visit)
    return plan, np.sort(np.concatenate(ids)), np.unique(np.concatenate(wanted))


def _hashed(names: Sequence[str]) -> Hashes:
    return hash_ids(pa.array(names, pa.string()))


def _needed(query: Query) -> list[tuple[str, str]]:
    """Return (noun, id) of the images that the store must hold."""
    needed = [("target", name) for name in query.target_ids] + [("subset member", name) for name in query.subset_ids]
    return needed if is_picture(query.reference_id) else [("reference", query.reference_id), *needed]


def _refuse_shared_ids(plans: Sequence[QueryFilePlan], ids: Sequence[Any], num_queries: int) -> None:
    """Raise CirError for a query id in two files."""
    buckets = -(-num_queries // _BUCKET)
    bounds = [(bucket << 64) // buckets for bucket in range(buckets + 1)]
    suspects = np.concatenate(
        ray.get([_repeated.remote(low, high - 1, *ids) for low, high in itertools.pairwise(bounds)])
    )[:_SUSPECTS]
    if not suspects.size:
        return
    owners: dict[str, str] = {}
    for plan, names in zip(plans, ray.get([_named.remote(plan, suspects) for plan in plans]), strict=True):
        for name in names:
            other = owners.setdefault(name, plan.uri)
            if other != plan.uri:
                raise CirError(
                    f"{files.redact(plan.uri)}: query id {name!r} is also in {files.redact(other)}; every query needs an "
                    "id of its own"
                )


@ray.remote(num_cpus=1, max_retries=5)
def _repeated(low: int, high: int, *ids: Hashes) -> Hashes:
    """Return hashes in [low, high] that several of the sorted arrays hold."""
    ranges = [(np.searchsorted(one, np.uint64(low)), np.searchsorted(one, np.uint64(high), "right")) for one in ids]
    ordered = np.sort(np.concatenate([one[start:stop] for one, (start, stop) in zip(ids, ranges, strict=True)]))
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])[:_SUSPECTS]


@ray.remote(num_cpus=1, max_retries=5)
def _named(plan: QueryFilePlan, suspects: Hashes) -> list[str]:
    """Return the query ids of a file that have one of these hashes."""
    return [
        query.query_id
        for part in plan.slices
        for queries in [read_query_slice(part)]
        for query, suspect in zip(queries, np.isin(_hashed([one.query_id for one in queries]), suspects), strict=True)
        if suspect
    ]


def _refuse_missing_images(plans: Sequence[QueryFilePlan], wanted: Sequence[Any], store: EmbeddingStore) -> None:
    """Raise CirError, counting them and naming some with their queries, for images that the store does not hold."""
    together = _united.remote(*wanted)
    numbers = np.arange(len(store.parts))
    width = max(1, int(ray.cluster_resources().get("CPU", 1)) * 4)
    seen = [
        _seen.remote(store.uri, list(map(int, share)), together)
        for share in np.array_split(numbers, width)
        if share.size
    ]
    count, hashes = ray.get(_unseen.remote(together, *seen))
    if not count:
        return
    shown: list[str] = []
    for plan in plans:
        if len(shown) < _SHOWN:
            shown += ray.get(_wanting.remote(plan, hashes))
    raise CirError(
        f"{count} images that the queries name are not in store {files.redact(store.uri)}: {'; '.join(shown[:_SHOWN])}"
        f"{' ...' if count > _SHOWN else ''}. A reference that is not in the store must be a URI (with ://) or an absolute "
        "path; targets and subset_ids must be in the store"
    )


@ray.remote(num_cpus=1, max_retries=5)
def _united(*wanted: Hashes) -> Hashes:
    return np.unique(np.concatenate(wanted))


@ray.remote(num_cpus=1, max_retries=5)
def _seen(store: str, parts: list[int], wanted: Hashes) -> npt.NDArray[np.bool_]:
    """Return which of the sorted hashes some parts of the store hold."""
    seen = np.zeros(wanted.size, np.bool_)
    for _, ids in EmbeddingStore.open(store).iter_ids(parts) if wanted.size else ():
        hashes = hash_ids(ids)
        places = np.minimum(np.searchsorted(wanted, hashes), wanted.size - 1)
        seen[places[wanted[places] == hashes]] = True
    return seen


@ray.remote(num_cpus=1, max_retries=5)
def _unseen(wanted: Hashes, *seen: npt.NDArray[np.bool_]) -> tuple[int, Hashes]:
    """Return how many hashes no share has seen, and some of them."""
    missing = wanted[~np.logical_or.reduce(seen)] if seen else wanted
    return missing.size, missing[:_SUSPECTS]


@ray.remote(num_cpus=1, max_retries=5)
def _wanting(plan: QueryFilePlan, hashes: Hashes) -> list[str]:
    """Say which queries of a file name images with these hashes."""
    found: list[str] = []
    for part in plan.slices:
        for query in read_query_slice(part):
            needed = _needed(query)
            absent = np.isin(_hashed([name for _, name in needed]), hashes)
            found += [
                f"{noun} {name!r} of query {query.query_id!r}"
                for (noun, name), missing in zip(needed, absent, strict=True)
                if missing
            ]
            if len(found) >= _SHOWN:
                return found
    return found
