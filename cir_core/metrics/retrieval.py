"""Retrieval metrics: ids in, one number per query out; the mean over queries is the score. numpy only.

A ranking is str[Q, k], best first. "" is an empty place (a gallery smaller than k): it takes up a rank and is
never a hit. Metrics are fractions in [0, 1]. Every function refuses, naming the query, what would change a
score unnoticed: an id listed twice in one ranking, a query without targets, a k that the ranking does not
reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cir_core.schema import CirError

Ids = npt.NDArray[np.str_]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Ranks = npt.NDArray[np.int64]

_ROWS_AT_ONCE = 8192  # bounds the sorted copy in the duplicate check to about 100 MB at k = 50


def hits(ranked_ids: Ids, target_ids: Sequence[Sequence[str]], *, query_ids: Sequence[str] | None = None) -> Flags:
    """Return bool[Q, k]: whether each ranked id is one of its query's targets.

    query_ids: names for error messages; without them a query is named by its position.
    Raises CirError for shapes that do not fit, an id twice in one ranking, and a query whose targets are
    missing, empty strings or repeated.

    >>> hits(np.array([["c", "a", "b"]]), [("a", "b")])
    array([[False,  True,  True]])
    """
    return _hits(ranked_ids, target_ids, query_ids, "target")


def _hits(ranked_ids: Ids, wanted_ids: Sequence[Sequence[str]], query_ids: Sequence[str] | None, noun: str) -> Flags:
    ranked = _checked_ranking(ranked_ids, len(wanted_ids), query_ids)
    counts = _checked_counts(wanted_ids, query_ids, noun)
    found = np.zeros(ranked.shape, dtype=np.bool_)
    for place in range(int(counts.max(initial=0))):
        rows = np.flatnonzero(counts > place)  # the n-th targets of all the queries that have one, at a time
        wanted = np.array([wanted_ids[row][place] for row in rows.tolist()], dtype=np.str_)
        if rows.size == counts.size:  # the usual case; spares a copy of the ranking
            found |= ranked == wanted[:, None]
        else:
            found[rows] |= ranked[rows] == wanted[:, None]
    return found


def first_hit_rank(
    ranked_ids: Ids, target_ids: Sequence[Sequence[str]], *, query_ids: Sequence[str] | None = None
) -> Ranks:
    """Return int64[Q]: the rank (from 1) of the best-placed target; 0 where no target is in the ranking.

    >>> first_hit_rank(np.array([["c", "a", "b"], ["c", "a", "b"]]), [("b", "a"), ("z",)])
    array([2, 0])
    """
    return _first_rank(hits(ranked_ids, target_ids, query_ids=query_ids))


def recall_at_k(
    ranked_ids: Ids,
    target_ids: Sequence[Sequence[str]],
    k: int,
    *,
    query_ids: Sequence[str] | None = None,
) -> Floats:
    """Return float64[Q]: 1 where any target is among the first k results, else 0.

    The literature of composed retrieval calls this Recall@K. With one target it equals recall; with several
    it is what information retrieval calls Success@K (hit rate), not the fraction of the targets that were
    found. Raises CirError as `hits` does, and for a k that the ranking does not reach.

    >>> ranked = np.array([["c", "a", "b"], ["b", "c", "a"]])
    >>> recall_at_k(ranked, [("a",), ("a", "d")], k=2)
    array([1., 0.])
    """
    found = hits(ranked_ids, target_ids, query_ids=query_ids)
    top = found[:, : _checked_k(k, found.shape[1])]
    return np.asarray(top.any(axis=1), dtype=np.float64)


def set_recall_at_k(
    ranked_ids: Ids,
    target_ids: Sequence[Sequence[str]],
    k: int,
    *,
    query_ids: Sequence[str] | None = None,
) -> Floats:
    """Return float64[Q]: the share of the query's targets that are among the first k results.

    Recall@K as information retrieval has it; the averaged set recall of Pic2Word's domain conversion (which
    adds 1e-5 to the number of targets). Raises CirError as `recall_at_k` does.

    >>> set_recall_at_k(np.array([["a", "x", "b", "y"]]), [("a", "b", "c", "d")], k=3)
    array([0.5])
    """
    found = hits(ranked_ids, target_ids, query_ids=query_ids)
    top = found[:, : _checked_k(k, found.shape[1])]
    counts = np.array([len(targets) for targets in target_ids], dtype=np.int64)
    return np.asarray(top.sum(axis=1) / counts, dtype=np.float64)


def soft_recall_at_k(
    ranked_ids: Ids,
    target_values: Sequence[Mapping[str, float]],
    k: int,
    *,
    query_ids: Sequence[str] | None = None,
) -> Floats:
    """Return float64[Q]: the best value that any of the first k results has for its query, at least 0.

    target_values: for each query, image id -> value; an image that is absent has 0. CIRR's `target_soft`, from
    -1 to 1, as CIRPLANT's evaluation counts it. With one target of value 1 this is `recall_at_k`. Raises
    CirError as `recall_at_k` does, except that a query may lack targets: it scores 0.

    >>> ranked = np.array([["x", "a", "b"]] * 2)
    >>> soft_recall_at_k(ranked, [{"a": 0.5, "b": 1.0}, {"a": -1.0}], k=2)
    array([0.5, 0. ])
    """
    ranked = _checked_ranking(ranked_ids, len(target_values), query_ids)
    rows = ranked[:, : _checked_k(k, ranked.shape[1])].tolist()
    pairs = zip(rows, target_values, strict=True)
    best = [max((values.get(name, 0.0) for name in row if name), default=0.0) for row, values in pairs]
    return np.maximum(np.array(best, dtype=np.float64), 0.0)


def recall_subset_at_k(
    ranked_ids: Ids,
    target_ids: Sequence[Sequence[str]],
    subset_ids: Sequence[Sequence[str]],
    k: int,
    *,
    query_ids: Sequence[str] | None = None,
) -> Floats:
    """Return float64[Q]: 1 where a target is among the first k results of the query's own subset, else 0.

    CIRR's Recall_subset@K (Liu et al., ICCV 2021): ranks the target only against the other members of its
    image group. Take the reference out of the ranking first, as CIRR does. A ranking that is too short to
    tell (no target listed and fewer than k members listed, though the subset holds more) is a CirError: it
    must not count as a miss.

    >>> ranked = np.array([["x", "b", "y", "a"], ["x", "b", "y", "a"]])
    >>> recall_subset_at_k(ranked, [("a",), ("a",)], [("a", "b"), ("a", "b")], k=1)
    array([0., 0.])
    >>> recall_subset_at_k(ranked, [("a",), ("a",)], [("a", "b"), ("a", "b")], k=2)
    array([1., 1.])
    """
    if len(subset_ids) != len(target_ids):
        raise CirError(f"{len(subset_ids)} subsets for {len(target_ids)} queries")
    found = hits(ranked_ids, target_ids, query_ids=query_ids)
    members = _hits(ranked_ids, subset_ids, query_ids, "subset member")
    sizes = np.array([len(subset) for subset in subset_ids], dtype=np.int64)
    for row in np.flatnonzero(sizes < _checked_k(k, found.shape[1])).tolist():
        raise CirError(f"{_name(row, query_ids)}: recall_subset@{k} on a subset of {sizes[row]}")
    unknown = ~(found & members).any(axis=1) & (members.sum(axis=1) < np.minimum(k, sizes))
    for row in np.flatnonzero(unknown).tolist():
        raise CirError(
            f"{_name(row, query_ids)}: its ranking holds {members[row].sum()} of its {sizes[row]} subset "
            f"members and no target, too few to tell recall_subset@{k}; rank the whole subset"
        )
    hit = found & members & (np.cumsum(members, axis=1) <= k)
    return np.asarray(hit.any(axis=1), dtype=np.float64)


def average_precision_at_k(
    ranked_ids: Ids,
    target_ids: Sequence[Sequence[str]],
    k: int,
    *,
    query_ids: Sequence[str] | None = None,
) -> Floats:
    """Return float64[Q]: AP@K = sum over i <= K of P(i) rel(i), divided by min(number of targets, K).

    P(i) is the precision among the first i results, rel(i) is 1 where result i is a target. The mean is
    CIRCO's mAP@K (Baldrati et al., ICCV 2023, section 4). Other libraries divide by the number of hits or of
    targets instead. Raises CirError as `recall_at_k` does.

    >>> average_precision_at_k(np.array([["a", "x", "b", "y"]]), [("a", "b", "c")], k=4)  # (1/1 + 2/3) / 3
    array([0.55555556])
    >>> average_precision_at_k(np.array([["a", "x", "b", "y"]]), [("a", "b", "c")], k=2)  # (1/1) / 2
    array([0.5])
    """
    found = hits(ranked_ids, target_ids, query_ids=query_ids)
    top = found[:, : _checked_k(k, found.shape[1])]
    precision = np.cumsum(top, axis=1) / np.arange(1, k + 1)
    counts = np.array([len(targets) for targets in target_ids], dtype=np.int64)
    return np.asarray((precision * top).sum(axis=1) / np.minimum(counts, k), dtype=np.float64)


def pessimistic_rank(
    ranked_ids: Ids,
    scores: npt.NDArray[np.floating],
    target_ids: Sequence[Sequence[str]],
    *,
    complete: bool | Flags = False,
    query_ids: Sequence[str] | None = None,
) -> Ranks:
    """Return int64[Q]: the rank of the best-placed target if it lost every tie; 0 if that is past the list.

    Where no tie touches the target this is `first_hit_rank`. A model that gives every image the same score
    has a good `first_hit_rank` by luck of the gallery's order, and the worst `pessimistic_rank`.
    scores: float[Q, k], not increasing along a row. complete: whether a row (or each row: bool[Q]) holds the
    whole gallery; where not, a tie with the last result may go on past the list, and its targets get 0.

    >>> ranked, scores = np.array([["x", "a", "y", "z"]]), np.array([[0.9, 0.5, 0.5, 0.1]])
    >>> first_hit_rank(ranked, [("a",)]), pessimistic_rank(ranked, scores, [("a",)])
    (array([2]), array([3]))
    """
    found = hits(ranked_ids, target_ids, query_ids=query_ids)
    if scores.shape != found.shape:
        raise CirError(f"scores {scores.shape} for ranked ids {found.shape}; expected the same shape")
    first = _first_rank(found)
    filled = np.asarray(ranked_ids, dtype=np.str_) != ""
    own = scores.max(axis=1, where=found, initial=-np.inf)[:, None]
    rivals = ~found & filled & (scores >= own)
    tied = (rivals & (scores == own)).any(axis=1)
    last = scores.min(axis=1, where=filled, initial=np.inf)
    runs_on = tied & (last == own[:, 0]) & ~np.asarray(complete)
    return np.where((first == 0) | runs_on, 0, rivals.sum(axis=1) + 1).astype(np.int64)


def _first_rank(found: Flags) -> Ranks:
    if found.shape[1] == 0:
        return np.zeros(found.shape[0], dtype=np.int64)
    return np.where(found.any(axis=1), found.argmax(axis=1) + 1, 0).astype(np.int64)


def _name(row: int, query_ids: Sequence[str] | None) -> str:
    return f"query {query_ids[row]!r}" if query_ids is not None else f"query at position {row}"


def _checked_k(k: int, reach: int) -> int:
    if k < 1:
        raise CirError(f"k must be at least 1, not {k}")
    if k > reach:
        raise CirError(f"k = {k}, but the ranking holds {reach} places; rank {k - reach} more")
    return k


def _checked_ranking(ranked_ids: Ids, num_queries: int, query_ids: Sequence[str] | None) -> Ids:
    ranked = np.asarray(ranked_ids, dtype=np.str_)
    if ranked.ndim != 2 or ranked.shape[0] != num_queries:
        raise CirError(
            f"ranked ids {ranked.shape} for the targets of {num_queries} queries; expected [{num_queries}, k]"
        )
    if query_ids is not None and len(query_ids) != num_queries:
        raise CirError(f"{len(query_ids)} query_ids for {num_queries} queries")
    for start in range(0, num_queries, _ROWS_AT_ONCE):
        block = np.sort(ranked[start : start + _ROWS_AT_ONCE], axis=1)
        twice = (block[:, 1:] == block[:, :-1]) & (block[:, 1:] != "")
        if twice.any():
            row = int(twice.any(axis=1).argmax())
            name = str(block[row, 1:][twice[row]][0])
            raise CirError(f"{_name(start + row, query_ids)}: {name!r} is listed twice in its ranking")
    return ranked


def _checked_counts(wanted_ids: Sequence[Sequence[str]], query_ids: Sequence[str] | None, noun: str) -> Ranks:
    for row, wanted in enumerate(wanted_ids):
        if isinstance(wanted, str):
            raise CirError(f"{_name(row, query_ids)}: {noun}s must be a sequence of ids, not the string {wanted!r}")
        if not wanted or "" in wanted:
            raise CirError(f"{_name(row, query_ids)}: no {noun}s, or an empty id among them")
        if len(wanted) > 1 and len(set(wanted)) != len(wanted):
            raise CirError(f"{_name(row, query_ids)}: a {noun} is listed twice in {tuple(wanted)}")
    return np.array([len(wanted) for wanted in wanted_ids], dtype=np.int64)
