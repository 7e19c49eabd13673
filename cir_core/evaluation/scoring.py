"""Score a ranking on a benchmark: every metric with its interval, per query, with the protocol beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cir_core import metrics as M
from cir_core.benchmarks import Benchmark, near_matches
from cir_core.evaluation.per_query import RANKS, Columns, membership, per_query_columns
from cir_core.evaluation.protocol import align, apply_protocol, subset_lists
from cir_core.schema import CirError, Ranking

TIES = {
    "listed": "in the ranking's order; the pessimistic metrics count a tie against the target",
    "against_target": "always against the target",
}


@dataclass(frozen=True)
class EvaluationResult:
    """A score and all that is needed to read it.

    metrics: fractions in [0, 1]: each metric of the benchmark, the headline by kind as "recall@10/change", and
        the aspects' metric by aspect as "map@10/negation".
    intervals: the same names, (low, high): bootstrap over queries.
    per_query: Arrow table, a row a query in benchmark order: query_id, kind, aspects (list<string>, only where
        the benchmark has them), rank (from 1, of the best-placed target that recall counts; null where it is
        not in the list), pessimistic_rank, and a float64 column for each metric.
    protocol: the benchmark's protocol, the confidence of the intervals, and under "ranking" what the ranking
    says.
    not_applicable: the metrics of aspects without queries ("n/a"); they are in no other field.
    """

    benchmark: str
    split: str
    headline: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_query: pa.Table
    protocol: dict[str, object]
    not_applicable: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the scores in percent with their intervals, and the protocol, for people to read."""
        width = max(len(name) for name in (*self.metrics, *self.not_applicable))
        lines = [f"{self.benchmark} {self.split}, {self.per_query.num_rows} queries"]
        for name, value in self.metrics.items():
            low, high = self.intervals[name]
            lines.append(f"  {name:<{width}}  {100 * value:6.2f} %  [{100 * low:.2f}, {100 * high:.2f}]")
        lines += [f"  {name:<{width}}     n/a" for name in self.not_applicable]
        lines += [f"  {name}: {value}" for name, value in self.protocol.items()]
        return "\n".join(lines)


def evaluate(
    ranking: Ranking,
    benchmark: Benchmark,
    *,
    subset_ranking: Ranking | None = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> EvaluationResult:
    """Score a ranking: every metric of the benchmark, with bootstrap intervals, per query and by kind.

    Where the protocol removes references they are removed here, and later results move up. Where queries rank
    galleries of their own, all else is taken out. subset_ranking: the queries' subsets alone, ranked, for
    recall_subset@K where `ranking` is a top k of the gallery that need not hold them. confidence,
    num_resamples and seed go to `metrics.bootstrap_interval`. Raises CirError for a benchmark without ground
    truth and for every fault of the ranking: see `apply_protocol`.
    """
    if not benchmark.has_targets:
        raise CirError(f"{benchmark}: its ground truth is not public; write a submission instead")
    ranking = apply_protocol(ranking, benchmark)
    subsets = None
    if benchmark.max_subset_k:
        own = ranking if subset_ranking is None else align(subset_ranking, benchmark)
        subsets = subset_lists(own, benchmark, benchmark.max_subset_k)
    columns = per_query_columns(ranking, subsets, benchmark)
    values = _part_columns(benchmark, columns)
    intervals = {
        name: M.bootstrap_interval(value, confidence=confidence, num_resamples=num_resamples, seed=seed)
        for name, value in values.items()
        if value.size
    }
    return EvaluationResult(
        benchmark=benchmark.name,
        split=benchmark.split,
        headline=benchmark.headline,
        metrics={name: interval.mean for name, interval in intervals.items()},
        intervals={name: (interval.low, interval.high) for name, interval in intervals.items()},
        per_query=_table(benchmark, columns),
        protocol={
            "benchmark": benchmark.name,
            "split": benchmark.split,
            **benchmark.protocol,
            "ties": TIES[benchmark.ties],
            "confidence": confidence,
            "ranking": dict(ranking.protocol),
        },
        not_applicable=tuple(name for name, value in values.items() if not value.size),
    )


def compare(
    a: EvaluationResult | Sequence[EvaluationResult],
    b: EvaluationResult | Sequence[EvaluationResult],
    metric: str,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> M.PairedComparison:
    """Compare result B with result A on one metric, query by query: see `metrics.paired_bootstrap`.

    a, b: one result each; or the results of the same categories or tasks in the same order, whose unweighted means
    (`mean_of_results`) are then compared.
    metric: any name in the results' metrics, by kind too ("recall@10/change").
    Raises CirError for a metric that one lacks, and for results of another benchmark, protocol or query set.
    """
    all_a, all_b = ([item] if isinstance(item, EvaluationResult) else list(item) for item in (a, b))
    if not all_a or len(all_a) != len(all_b):
        raise CirError(f"cannot compare: {len(all_a)} results in A, {len(all_b)} in B; give the same categories")
    column, _, part = metric.partition("/")
    for one, other in zip(all_a, all_b, strict=True):
        _check_comparable(one, other, metric)
    return M.paired_group_bootstrap(
        [_rows_of(result, part).column(column).to_numpy() for result in all_a],
        [_rows_of(result, part).column(column).to_numpy() for result in all_b],
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )


def _check_comparable(a: EvaluationResult, b: EvaluationResult, metric: str) -> None:
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


def mean_of_results(results: Sequence[EvaluationResult], metric: str, *, seed: int = 0) -> M.Interval:
    """Return the unweighted mean of a metric over several results, with its 95 % interval.

    FashionIQ's score over its three categories, GeneCIS's over its four tasks: every result weighs the same,
    however many queries it has. Raises CirError for fewer than two results, a metric that one lacks, results
    of different benchmarks or splits, and one category or task twice.
    """
    if len(results) < 2:
        raise CirError(f"mean_of_results: {len(results)} results; a mean needs at least two")
    first = results[0]
    for result in results:
        if (result.benchmark, result.split) != (first.benchmark, first.split):
            raise CirError(f"mean_of_results: {result.benchmark} {result.split} with {first.benchmark} {first.split}")
        if metric not in result.metrics or metric not in result.per_query.column_names:
            raise CirError(f"a result has no metric {metric!r}; {near_matches(metric, result.metrics)}")
    query_sets = {result.per_query.column("query_id")[0].as_py() for result in results}
    if len(query_sets) < len(results):
        raise CirError("mean_of_results: the same queries twice; give one result for each category or task")
    return M.bootstrap_group_mean([result.per_query.column(metric).to_numpy() for result in results], seed=seed)


def _part_columns(benchmark: Benchmark, columns: Columns) -> dict[str, npt.NDArray[Any]]:
    """Every metric, then the headline by kind and the aspects' metric by aspect: float64 of the part's queries."""
    names = [query.query_id for query in benchmark.queries]
    values = {name: columns[name] for name in benchmark.metrics}
    kinds = np.array([benchmark.query_kinds.get(name, "") for name in names], dtype=np.str_)
    for kind in sorted(set(kinds.tolist()) - {""}):
        values[f"{benchmark.headline}/{kind}"] = columns[benchmark.headline][kinds == kind]
    for aspect, ids in benchmark.aspects.items():
        values[f"{benchmark.aspect_metric}/{aspect}"] = columns[benchmark.aspect_metric][membership(names, ids)]
    return values


def _table(benchmark: Benchmark, columns: Columns) -> pa.Table:
    names = [query.query_id for query in benchmark.queries]
    table: dict[str, pa.Array] = {
        "query_id": pa.array(names, pa.string()),
        "kind": pa.array([benchmark.query_kinds.get(name, "") for name in names], pa.string()),
    }
    if benchmark.aspects:
        of_query = [[aspect for aspect, ids in benchmark.aspects.items() if name in ids] for name in names]
        table["aspects"] = pa.array(of_query, pa.list_(pa.string()))
    for name, values in columns.items():
        ranks = name in RANKS
        table[name] = pa.array(values, pa.int64(), mask=np.asarray(values == 0)) if ranks else pa.array(values)
    return pa.table(table)


def _rows_of(result: EvaluationResult, part: str) -> pa.Table:
    """The per-query rows of a kind or an aspect, all of them for ""."""
    table = result.per_query
    if not part:
        return table
    kinds = pc.equal(table.column("kind"), part).to_numpy(zero_copy_only=False)
    if "aspects" not in table.column_names or kinds.any():
        return table.filter(pa.array(kinds))
    return table.filter(pa.array([part in aspects for aspects in table.column("aspects").to_pylist()]))
