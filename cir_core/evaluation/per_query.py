"""Every metric of a benchmark, one number per query: the protocol's choices become calls of cir_core.metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cir_core import metrics as M
from cir_core.benchmarks import Benchmark, metric_members, metric_parts
from cir_core.schema import Ranking

RANKS = ("rank", "pessimistic_rank")
Columns = dict[str, npt.NDArray[Any]]


def per_query_columns(ranking: Ranking, subsets: Ranking | None, benchmark: Benchmark) -> Columns:
    """Return RANKS as int64[Q] (0 = not in the list), then float64[Q] for each metric of the benchmark.

    ranking: under the benchmark's protocol (`apply_protocol`). subsets: each query's results inside its own
    subset (`subset_lists`), needed where the benchmark has such metrics. A query without targets, where the
    benchmark allows one, gets 0 throughout. Raises CirError as the metrics do.
    """
    answered = np.flatnonzero([bool(query.target_ids) for query in benchmark.queries])
    part = _Part(benchmark, ranking, subsets, answered.tolist())
    columns: Columns = {"rank": part.ranks(), "pessimistic_rank": part.pessimistic}
    for metric in benchmark.metrics:
        members = [part.metric(*metric_parts(name)) for name in metric_members(metric)]
        columns[metric] = np.mean(members, axis=0)
    return {name: _spread(values, answered, len(benchmark.queries)) for name, values in columns.items()}


class _Part:
    """The lists of the queries that have targets, and what counts as right for each."""

    def __init__(self, benchmark: Benchmark, ranking: Ranking, subsets: Ranking | None, rows: list[int]) -> None:
        self.benchmark, self.subsets, self.rows = benchmark, subsets, rows
        self.ids, self.scores = ranking.image_ids[rows], ranking.scores[rows]
        queries = [benchmark.queries[row] for row in rows]
        self.names = tuple(query.query_id for query in queries)
        self.targets = [query.target_ids for query in queries]
        self.counted = [query.target_ids[:1] for query in queries] if benchmark.recall == "first" else self.targets
        self.values = [benchmark.soft_targets.get(name, {}) for name in self.names]
        complete = (self.ids != "").sum(axis=1) >= np.array(benchmark.ranked_sizes(), dtype=np.int64)[rows]
        self.pessimistic = M.pessimistic_rank(
            self.ids, self.scores, self.counted, complete=complete, query_ids=self.names
        )

    def ranks(self) -> npt.NDArray[np.int64]:
        return M.first_hit_rank(self.ids, self.counted, query_ids=self.names)

    def metric(self, name: str, k: int) -> M.Floats:
        """Return one metric, float64 of the part's queries."""
        top = self.ids[:, :k]  # what lies deeper cannot matter, and the ranks' call has checked the whole list
        if name == "map":
            return M.average_precision_at_k(top, self.targets, k, query_ids=self.names)
        if name == "recall_subset":
            assert self.subsets is not None, "subset_lists makes them wherever a metric needs them"  # noqa: S101
            return self._recall(self.subsets.image_ids[self.rows], k)
        if name == "pessimistic_recall" or self.benchmark.ties == "against_target":
            return ((self.pessimistic > 0) & (self.pessimistic <= k)).astype(np.float64)
        return self._recall(top, k)

    def _recall(self, ids: npt.NDArray[np.str_], k: int) -> M.Floats:
        if self.benchmark.recall == "soft":
            return M.soft_recall_at_k(ids, self.values, k, query_ids=self.names)
        count = M.set_recall_at_k if self.benchmark.recall == "fraction" else M.recall_at_k
        return count(ids, self.counted, k, query_ids=self.names)


def _spread(values: npt.NDArray[Any], rows: npt.NDArray[np.int64], num_queries: int) -> npt.NDArray[Any]:
    """Put the values at their rows, 0 elsewhere."""
    if rows.size == num_queries:
        return values
    spread = np.zeros(num_queries, dtype=values.dtype)
    spread[rows] = values
    return spread


def membership(query_ids: Sequence[str], wanted: frozenset[str]) -> npt.NDArray[np.bool_]:
    """Return bool[Q]: which queries are among the wanted ones."""
    return np.array([name in wanted for name in query_ids], dtype=np.bool_)
