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

from cir_core.benchmarks import Benchmark, metric_members, metric_parts
from cir_core.schema import CirError, Query, Ranking

Ids = npt.NDArray[np.str_]
Scores = npt.NDArray[np.float32]

_NAMED = 3  # how many of a list of faults a message names


def apply_protocol(ranking: Ranking, benchmark: Benchmark) -> Ranking:
    """Return the ranking as the benchmark scores it: its queries in benchmark order, references removed if so
    asked, and only the query's own gallery where it has one.

    The result has at least `benchmark.max_k` places, "" where the whole gallery is ranked and is smaller than
    that. Raises CirError for queries missing, unknown or repeated, an image outside the gallery or twice in
    one list, lists out of order, scores that are NaN, a list too short for the metrics (saying by how much),
    and a ranking whose own protocol says "removed" where the benchmark keeps references.
    """
    lists = align(ranking, benchmark)
    if benchmark.own_galleries:
        lists = _subsets_only(lists, benchmark)
    lists = _at_least(lists, benchmark.max_k)
    _check_length(lists.image_ids, benchmark)
    return lists


def subset_lists(lists: Ranking, benchmark: Benchmark, k: int) -> Ranking:
    """Return each query's results inside its own subset, best first, at least k places wide.

    lists: of the whole gallery or of the subsets alone, under the protocol (`apply_protocol` or `align`).
    Raises CirError for a list that does not hold the first k of its subset.
    """
    subsets = _at_least(_subsets_only(lists, benchmark), k)
    for query, filled in zip(benchmark.queries, (subsets.image_ids != "").sum(axis=1).tolist(), strict=True):
        size = len(query.subset_ids) - int(benchmark.reference_removed and query.reference_id in query.subset_ids)
        if filled < min(k, size):
            raise CirError(
                f"{benchmark}: query {query.query_id!r}: its list holds {filled} of its subset of {size}, too few for "
                f"recall_subset@{k}; rank the whole gallery, or pass the subsets' own ranking as subset_ranking"
            )
    return subsets


def align(ranking: Ranking, benchmark: Benchmark) -> Ranking:
    """Return the checked lists in benchmark order, without the references that the protocol removes.

    Raises CirError as `apply_protocol` does, but for no list's length.
    """
    if not benchmark.reference_removed and ranking.protocol.get("reference") == "removed":
        raise CirError(f"{benchmark}: keeps references in the ranking, but this ranking was made without them")
    ids, scores = _in_benchmark_order(ranking, benchmark)
    _check_order(ids, scores, benchmark)
    if benchmark.reference_removed:
        ids, scores = _without_references(ids, scores, benchmark.queries)
    _check_membership(ids, benchmark)
    return Ranking(tuple(query.query_id for query in benchmark.queries), ids, scores, dict(ranking.protocol))


def _subsets_only(lists: Ranking, benchmark: Benchmark) -> Ranking:
    """Keep each query's own subset, as wide as the longest list then is."""
    subsets = [query.subset_ids for query in benchmark.queries]
    ids = lists.image_ids
    kept = np.zeros(ids.shape, dtype=np.bool_)
    for place in range(max(map(len, subsets))):
        names = np.array([names[place] if place < len(names) else "" for names in subsets], dtype=np.str_)
        kept |= (ids == names[:, None]) & (ids != "")
    ids, scores = _keep(ids, lists.scores, kept)
    width = int(kept.sum(axis=1).max(initial=0))
    return Ranking(lists.query_ids, ids[:, :width], scores[:, :width], lists.protocol)


def _at_least(lists: Ranking, k: int) -> Ranking:
    """Pad the lists with empty places to k."""
    if lists.image_ids.shape[1] >= k:
        return lists
    short = ((0, 0), (0, k - lists.image_ids.shape[1]))
    ids = np.pad(lists.image_ids, short, constant_values="")
    return Ranking(lists.query_ids, ids, np.pad(lists.scores, short, constant_values=-np.inf), lists.protocol)


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
    if list(ranking.query_ids) == wanted:
        return np.asarray(ranking.image_ids, dtype=np.str_), ranking.scores
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
    return _keep(ids, scores, ids != references[:, None])


def _keep(ids: Ids, scores: Scores, kept: npt.NDArray[np.bool_]) -> tuple[Ids, Scores]:
    """Move the kept results of each list up, in their order; the rest become empty places at its end."""
    new_ids = np.full(ids.shape, "", dtype=ids.dtype)
    new_scores = np.full(scores.shape, -np.inf, dtype=np.float32)
    places = np.arange(ids.shape[1]) < kept.sum(axis=1)[:, None]
    new_ids[places], new_scores[places] = ids[kept], scores[kept]  # both masks run row by row
    return new_ids, new_scores


def _check_length(ids: Ids, benchmark: Benchmark) -> None:
    """Each list must reach the deepest k, or hold all that the query ranks."""
    needed = np.minimum(benchmark.max_k, np.array(benchmark.ranked_sizes(), dtype=np.int64))
    filled = (ids != "").sum(axis=1)
    short = needed - filled
    row = int(short.argmax())
    if short[row] > 0:
        names = [name for metric in benchmark.metrics for name in metric_members(metric)]
        deepest = next(name for name in names if metric_parts(name)[1] == benchmark.max_k)
        without = " without the reference" if benchmark.reference_removed else ""
        advice = (
            "rank the query's own gallery" if benchmark.own_galleries else f"search with k = {_search_k(benchmark)}"
        )
        raise CirError(
            f"{benchmark}: {deepest} needs {needed[row]} results{without}, but query "
            f"{benchmark.queries[row].query_id!r} has {filled[row]}: {short[row]} too few; {advice}"
        )


def _search_k(benchmark: Benchmark) -> int:
    """The k that reaches the deepest metric even where the reference is found and removed."""
    return min(benchmark.max_k + int(benchmark.reference_removed), len(benchmark.gallery_ids))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
