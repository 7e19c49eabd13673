"""Bring a ranking under a benchmark's protocol, whatever the search did.

The same ranking gets the same score whether or not its references were taken out before. What would move a
score unnoticed is an error: queries missing or too many, a list too short, an image of another gallery, a
list out of order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cir_core.benchmarks import Benchmark, metric_parts
from cir_core.schema import CirError, Query, Ranking

Ids = npt.NDArray[np.str_]
Scores = npt.NDArray[np.float32]

_NAMED = 3  # how many of a list of faults a message names


def apply_protocol(ranking: Ranking, benchmark: Benchmark) -> Ranking:
    """Return the ranking as the benchmark scores it: its queries in benchmark order, references removed if so
    asked.

    The result has at least `benchmark.max_k` places, "" where the whole gallery is ranked and is smaller than
    that. Raises CirError for queries missing, unknown or repeated, an image outside the gallery or twice in
    one list, lists out of order, scores that are NaN, a list too short for the metrics (saying by how much),
    and a ranking whose own protocol says "removed" where the benchmark keeps references.
    """
    if not benchmark.reference_removed and ranking.protocol.get("reference") == "removed":
        raise CirError(f"{benchmark}: keeps references in the ranking, but this ranking was made without them")
    ids, scores = _in_benchmark_order(ranking, benchmark)
    _check_order(ids, scores, benchmark)
    _check_membership(ids, benchmark)
    if benchmark.reference_removed:
        ids, scores = _without_references(ids, scores, benchmark.queries)
    short = max(0, benchmark.max_k - ids.shape[1])
    ids = np.pad(ids, ((0, 0), (0, short)), constant_values="")
    scores = np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf)
    _check_length(ids, benchmark)
    query_ids = tuple(query.query_id for query in benchmark.queries)
    return Ranking(query_ids, ids, scores, dict(ranking.protocol))


def _in_benchmark_order(ranking: Ranking, benchmark: Benchmark) -> tuple[Ids, Scores]:
    rows = {name: row for row, name in enumerate(ranking.query_ids)}
    wanted = [query.query_id for query in benchmark.queries]
    if len(rows) != len(ranking.query_ids):
        repeated = sorted(name for name, row in rows.items() if ranking.query_ids.index(name) != row)
        raise CirError(f"{benchmark}: the ranking lists a query twice: {_some(repeated)}")
    missing = [name for name in wanted if name not in rows]
    extra = sorted(rows.keys() - set(wanted))
    if missing or extra:
        faults = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
        faults += [f"{len(extra)} unknown ({_some(extra)})"] if extra else []
        raise CirError(f"{benchmark}: the ranking's queries do not match: {', '.join(faults)}")
    order = np.array([rows[name] for name in wanted], dtype=np.int64)
    return np.asarray(ranking.image_ids, dtype=np.str_)[order], ranking.scores[order]


def _check_order(ids: Ids, scores: Scores, benchmark: Benchmark) -> None:
    empty = ids == ""
    faults = {
        "holds a score that is not a number": np.isnan(scores).any(axis=1),
        "has an empty place before a result": (empty[:, :-1] & ~empty[:, 1:]).any(axis=1),
        "is not ordered by falling score": ((scores[:, 1:] > scores[:, :-1]) & ~empty[:, 1:]).any(axis=1),
    }
    for fault, rows in faults.items():
        if rows.any():
            name = benchmark.queries[int(rows.argmax())].query_id
            raise CirError(f"{benchmark}: query {name!r}: its list {fault}; rank by (-score, gallery index)")


def _check_membership(ids: Ids, benchmark: Benchmark) -> None:
    known = pc.is_in(pa.array(ids.ravel(), pa.string()), value_set=pa.array(["", *benchmark.gallery_ids]))
    strange = ~known.to_numpy(zero_copy_only=False).reshape(ids.shape)
    if strange.any():
        row = int(strange.any(axis=1).argmax())
        example = str(ids[row][strange[row]][0])
        raise CirError(
            f"{benchmark}: {int(strange.sum())} ranked ids are not among its {len(benchmark.gallery_ids)} "
            f"gallery ids, such as {example!r} of query {benchmark.queries[row].query_id!r}; was another "
            "gallery searched?"
        )


def _without_references(ids: Ids, scores: Scores, queries: tuple[Query, ...]) -> tuple[Ids, Scores]:
    references = np.array([query.reference_id for query in queries], dtype=np.str_)
    removed = ids == references[:, None]
    order = np.argsort(removed, axis=1, kind="stable")  # a removed place goes last, the rest keep their order
    ids = np.take_along_axis(np.where(removed, "", ids), order, axis=1)
    scores = np.take_along_axis(np.where(removed, np.float32(-np.inf), scores), order, axis=1)
    return ids, scores


def _check_length(ids: Ids, benchmark: Benchmark) -> None:
    """Each list must reach the deepest k, or hold the whole gallery less a removed reference."""
    gallery_size = len(benchmark.gallery_ids) - int(benchmark.reference_removed)
    needed = min(benchmark.max_k, gallery_size)
    filled = (ids != "").sum(axis=1)
    row = int(filled.argmin())
    if filled[row] < needed:
        deepest = next(name for name in benchmark.metrics if metric_parts(name)[1] == benchmark.max_k)
        without = " without the reference" if benchmark.reference_removed else ""
        raise CirError(
            f"{benchmark}: {deepest} needs {needed} results{without}, but query "
            f"{benchmark.queries[row].query_id!r} has {filled[row]}: {needed - filled[row]} too few; "
            f"search with k = {needed + int(benchmark.reference_removed)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
