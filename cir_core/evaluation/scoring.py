"""Score a ranking on a benchmark: every metric with its interval, per query, with the protocol beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cir_core import metrics as M
from cir_core.benchmarks import Benchmark, metric_parts, near_matches
from cir_core.evaluation.protocol import apply_protocol
from cir_core.schema import CirError, Ranking


@dataclass(frozen=True)
class EvaluationResult:
    """A score and all that is needed to read it.

    metrics: fractions in [0, 1]: each metric of the benchmark, and the headline by kind as
    "recall@10/change".
    intervals: the same names, (low, high): bootstrap over queries.
    per_query: Arrow table, a row a query in benchmark order: query_id, kind, rank (of the best-placed target,
    from 1;
        null where it is not in the list), pessimistic_rank, and a float64 column for each metric.
    protocol: the benchmark's protocol, the confidence of the intervals, and under "ranking" what the ranking
    says.
    """

    benchmark: str
    split: str
    headline: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_query: pa.Table
    protocol: dict[str, object]

    def describe(self) -> str:
        """Return the scores in percent with their intervals, and the protocol, for people to read."""
        width = max(len(name) for name in self.metrics)
        lines = [f"{self.benchmark} {self.split}, {self.per_query.num_rows} queries"]
        for name, value in self.metrics.items():
            low, high = self.intervals[name]
            lines.append(f"  {name:<{width}}  {100 * value:6.2f} %  [{100 * low:.2f}, {100 * high:.2f}]")
        lines += [f"  {name}: {value}" for name, value in self.protocol.items()]
        return "\n".join(lines)


def evaluate(
    ranking: Ranking,
    benchmark: Benchmark,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> EvaluationResult:
    """Score a ranking: every metric of the benchmark, with bootstrap intervals, per query and by kind.

    Where the protocol removes references they are removed here, and later results move up. confidence,
    num_resamples and seed go to `metrics.bootstrap_interval`. Raises CirError for a benchmark without ground
    truth and for every fault of the ranking: see `apply_protocol`.
    """
    if not benchmark.has_targets:
        raise CirError(f"{benchmark}: its ground truth is not public; write a submission instead")
    ranking = apply_protocol(ranking, benchmark)
    columns = _per_query_columns(ranking, benchmark)
    kinds = np.array([benchmark.query_kinds.get(name, "") for name in ranking.query_ids], dtype=np.str_)
    values = {name: columns[name] for name in benchmark.metrics}
    for kind in sorted(set(kinds.tolist()) - {""}):
        values[f"{benchmark.headline}/{kind}"] = columns[benchmark.headline][kinds == kind]
    intervals = {
        name: M.bootstrap_interval(value, confidence=confidence, num_resamples=num_resamples, seed=seed)
        for name, value in values.items()
    }
    ids = {
        "query_id": pa.array(ranking.query_ids, pa.string()),
        "kind": pa.array(kinds.tolist(), pa.string()),
    }
    return EvaluationResult(
        benchmark=benchmark.name,
        split=benchmark.split,
        headline=benchmark.headline,
        metrics={name: interval.mean for name, interval in intervals.items()},
        intervals={name: (interval.low, interval.high) for name, interval in intervals.items()},
        per_query=pa.table({**ids, **{name: _arrow_column(name, value) for name, value in columns.items()}}),
        protocol={
            "benchmark": benchmark.name,
            "split": benchmark.split,
            **benchmark.protocol,
            "ties": "in the ranking's order; the pessimistic metrics count a tie against the target",
            "confidence": confidence,
            "ranking": dict(ranking.protocol),
        },
    )


def compare(
    a: EvaluationResult,
    b: EvaluationResult,
    metric: str,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> M.PairedComparison:
    """Compare result B with result A on one metric, query by query: see `metrics.paired_bootstrap`.

    metric: any name in both results' metrics, by kind too ("recall@10/change").
    Raises CirError for a metric that either lacks, and for results of another benchmark, protocol or query
    set.
    """
    for label, result in (("A", a), ("B", b)):
        if metric not in result.metrics:
            raise CirError(f"result {label} has no metric {metric!r}; {near_matches(metric, result.metrics)}")
    for key in sorted((a.protocol.keys() | b.protocol.keys()) - {"ranking", "confidence"}):
        if a.protocol.get(key) != b.protocol.get(key):
            raise CirError(
                f"cannot compare: {key} is {a.protocol.get(key)!r} in A and {b.protocol.get(key)!r} in B; "
                "evaluate both under one protocol"
            )
    if not a.per_query.column("query_id").equals(b.per_query.column("query_id")):
        raise CirError("cannot compare: A and B hold different queries")
    column, _, kind = metric.partition("/")
    rows_a, rows_b = a.per_query, b.per_query
    if kind:
        rows_a, rows_b = (table.filter(pc.field("kind") == kind) for table in (rows_a, rows_b))
    return M.paired_bootstrap(
        rows_a.column(column).to_numpy(),
        rows_b.column(column).to_numpy(),
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )


def _per_query_columns(ranking: Ranking, benchmark: Benchmark) -> dict[str, npt.NDArray[Any]]:
    """Ranks as int64[Q] (0 = not in the list), then float64[Q] for each metric of the benchmark."""
    ids, names = ranking.image_ids, ranking.query_ids
    targets = [query.target_ids for query in benchmark.queries]
    gallery_size = len(benchmark.gallery_ids) - int(benchmark.reference_removed)
    complete = (ids != "").sum(axis=1) >= gallery_size
    pessimistic = M.pessimistic_rank(ids, ranking.scores, targets, complete=complete, query_ids=names)
    columns: dict[str, npt.NDArray[Any]] = {
        "rank": M.first_hit_rank(ids, targets, query_ids=names),
        "pessimistic_rank": pessimistic,
    }
    for metric in benchmark.metrics:
        name, k = metric_parts(metric)
        if name == "recall":
            columns[metric] = M.recall_at_k(ids, targets, k, query_ids=names)
        elif name == "map":
            columns[metric] = M.average_precision_at_k(ids, targets, k, query_ids=names)
        elif name == "recall_subset":
            subsets = [query.subset_ids for query in benchmark.queries]
            columns[metric] = M.recall_subset_at_k(ids, targets, subsets, k, query_ids=names)
        else:
            columns[metric] = ((pessimistic > 0) & (pessimistic <= k)).astype(np.float64)
    return columns


def _arrow_column(name: str, values: npt.NDArray[Any]) -> pa.Array:
    if name in ("rank", "pessimistic_rank"):
        return pa.array(values, pa.int64(), mask=np.asarray(values == 0))
    return pa.array(values, pa.float64())
