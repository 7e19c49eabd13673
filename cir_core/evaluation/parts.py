"""Scores of a part of the queries, for catalogues whose queries and gallery are never in one place.

`evaluate` wants all queries and the whole gallery. A part needs its queries, their lists and the size of what each ranks;
its values, counted, add up to the scores and intervals that `evaluate` gives for everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cir_core import metrics as M
from cir_core.benchmarks import metric_parts
from cir_core.schema import CirError, Query, Ranking

ValueCounts = dict[str, list[tuple[float, int]]]  # metric -> (value, number of queries), by value: fit for JSON


def score_part(
    ranking: Ranking, queries: Sequence[Query], metrics: Sequence[str], ranked_sizes: npt.ArrayLike
) -> tuple[pa.Table, ValueCounts]:
    """Score lists in which every target that counts may stand: references to be removed are already out.

    queries: those of the ranking, in its order, each with targets. metrics: recall@K, pessimistic_recall@K and map@K, K at
    most the width of the lists. ranked_sizes: how many images each query ranks, [Q] or one number.
    Returns the per-query table (query_id, rank, pessimistic_rank; null where no target is in the list) and the values.
    Raises CirError as cir_core.metrics does.
    """
    names, targets = [query.query_id for query in queries], [query.target_ids for query in queries]
    if names != list(ranking.query_ids):
        raise CirError("score_part: the ranking is not of these queries, or in another order")
    complete = (ranking.image_ids != "").sum(axis=1) >= np.asarray(ranked_sizes)
    ranks = M.first_hit_rank(ranking.image_ids, targets, query_ids=names)
    pessimistic = M.pessimistic_rank(ranking.image_ids, ranking.scores, targets, complete=complete, query_ids=names)
    columns = {"rank": ranks, "pessimistic_rank": pessimistic}
    table = {name: pa.array(values, pa.int64(), mask=values == 0) for name, values in columns.items()}
    counts = {}
    for metric in metrics:
        name, k = metric_parts(metric)
        if name == "map":
            values = M.average_precision_at_k(ranking.image_ids[:, :k], targets, k, query_ids=names)
        elif name in ("recall", "pessimistic_recall"):
            place = ranks if name == "recall" else pessimistic
            values = ((place > 0) & (place <= k)).astype(np.float64)
        else:
            raise CirError(f"score_part: {metric} needs more than a list and its targets")
        counts[metric] = sorted(Counter(values.tolist()).items())
    return pa.table({"query_id": pa.array(names, pa.string()), **table}), counts


def total_scores(
    parts: Iterable[Mapping[str, Iterable[tuple[float, int]]]], *, num_resamples: int = 10_000, seed: int = 0
) -> dict[str, M.Interval]:
    """Add up the value counts of all parts: each metric's mean and 95 % bootstrap interval over all their queries."""
    totals: dict[str, Counter[float]] = {}
    for part in parts:
        for metric, counts in part.items():
            totals.setdefault(metric, Counter()).update(dict(counts))
    return {
        metric: M.bootstrap_counts(counts, num_resamples=num_resamples, seed=seed)
        for metric, counts in totals.items()
        if counts
    }
