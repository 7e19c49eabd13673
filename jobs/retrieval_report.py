"""What a retrieval run shows and keeps: tables, the alpha plot, the contact sheet, scores and rankings, MLflow metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from cir_core import files
from cir_core.benchmarks import Benchmark
from cir_core.evaluation import EvaluationResult, compare, save_ranking
from cir_core.reporting import contact_sheet, plots
from cir_core.schema import Ranking
from cir_core.shards import Sample, list_shards, read_shard
from jobs import tracking
from jobs.models import ModelInfo
from jobs.retrieval import Setting

SCENES_NOTE = "generated data: a smoke signal, not a benchmark result"


@dataclass(frozen=True)
class Variant:
    """One encoder that is compared. label: as people read it."""

    label: str
    info: ModelInfo


@dataclass(frozen=True)
class Outcome:
    """One variant's rankings and scores on the reported split, and the alpha chosen for each method."""

    variant: Variant
    rankings: dict[Setting, Ranking]
    results: dict[Setting, EvaluationResult]
    chosen: dict[str, float | None]

    def best(self, method: str) -> EvaluationResult:
        """Return a method's result at its chosen alpha."""
        return self.results[(method, self.chosen[method])]


def results_table(outcomes: Sequence[Outcome], benchmark: Benchmark) -> Table:
    """One row a method, one column a variant: the headline metric with its interval at the chosen alpha."""
    table = Table(title=f"{benchmark}: {benchmark.headline} in percent [95 % interval] at the chosen alpha")
    table.add_column("method")
    for outcome in outcomes:
        table.add_column(outcome.variant.label)
    for method in outcomes[0].chosen:
        cells = []
        for outcome in outcomes:
            result, alpha = outcome.best(method), outcome.chosen[method]
            low, high = result.intervals[benchmark.headline]
            at = "" if alpha is None else f" at {alpha:g}"
            cells.append(f"{100 * result.metrics[benchmark.headline]:.1f} [{100 * low:.1f}, {100 * high:.1f}]{at}")
        table.add_row(method, *cells)
    return table


def comparisons_table(outcomes: Sequence[Outcome], benchmark: Benchmark, method: str) -> Table:
    """Say what tuning did for `method`, and what `method` does better than the others: paired bootstraps, same queries."""
    last = outcomes[-1]
    pairs = []
    if len(outcomes) == 2:
        labels = [outcome.variant.label for outcome in outcomes]
        pairs.append((f"{method}: {labels[1]} - {labels[0]}", outcomes[0].best(method), last.best(method)))
    for outcome in outcomes[::-1]:
        for rival in (name for name in outcome.chosen if name != method):
            name = f"{method} {last.variant.label} - {rival} {outcome.variant.label}"
            pairs.append((name, outcome.best(rival), last.best(method)))
    table = Table(title=f"differences of {benchmark.headline} in points, the same queries", show_header=False)
    for name, one, other in pairs:
        found = compare(one, other, benchmark.headline)
        interval = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        table.add_row(name, interval, f"better in {100 * found.probability_b_better:.1f} % of resamples")
    return table


def per_query_columns(outcomes: Sequence[Outcome], benchmark: Benchmark, method: str) -> dict[str, list[Any]]:
    """Return the per-query table: the query and, for each variant, the rank of its best-placed target (None: not in the list)."""
    columns: dict[str, list[Any]] = {
        "query_id": [query.query_id for query in benchmark.queries],
        "kind": [benchmark.query_kinds.get(query.query_id, "") for query in benchmark.queries],
        "reference": [query.reference_id for query in benchmark.queries],
        "relative_caption": [query.relative_caption for query in benchmark.queries],
        "targets": [" ".join(query.target_ids) for query in benchmark.queries],
    }
    for outcome in outcomes:
        columns[f"rank {outcome.variant.label}"] = outcome.best(method).per_query.column("rank").to_pylist()
    return columns


def gallery_pictures(benchmark: Benchmark, wanted: frozenset[str]) -> dict[str, bytes]:
    """Return the encoded pictures of some gallery images."""
    found = {}
    for shard in list_shards(benchmark.image_shards):
        for sample in read_shard(shard, require_caption=False):
            if isinstance(sample, Sample) and sample.key in wanted:
                found[sample.key] = sample.image
    return found


def write_report(outcomes: Sequence[Outcome], benchmark: Benchmark, folder: str, *, method: str, num_rows: int) -> None:
    """Write plot, contact sheet, scores with their protocol, and rankings below a local folder.

    Args:
        outcomes: one per encoder.
        benchmark: the reported split.
        folder: local folder.
        method: the one that plot and contact sheet show.
        num_rows: queries on the contact sheet.
    """
    note = SCENES_NOTE if benchmark.name == "scenes" else ""
    title = f"{benchmark.name} {benchmark.split}: {method}"
    _plot(outcomes, benchmark, f"{folder}/alpha.png", method=method, title=title, note=note)
    lists = {outcome.variant.label: outcome.rankings[(method, outcome.chosen[method])] for outcome in outcomes}
    rows = contact_sheet.contact_sheet_rows(lists, benchmark, num_rows=num_rows)
    pictures = gallery_pictures(benchmark, contact_sheet.image_ids_of(rows))
    protocol = outcomes[-1].best(method).protocol
    sheet = f"{folder}/contact_sheet.html"
    contact_sheet.write_contact_sheet(sheet, title, rows, pictures, note=note, protocol=protocol)
    files.write_json(f"{folder}/scores.json", [score for outcome in outcomes for score in _scores(outcome)])
    for outcome in outcomes:
        label = outcome.variant.label.replace(" ", "_")
        for name in outcome.chosen:
            by_alpha = {alpha: ranking for (other, alpha), ranking in outcome.rankings.items() if other == name}
            save_ranking(by_alpha, f"{folder}/rankings/{label}/{name}.parquet")


def _plot(outcomes: Sequence[Outcome], benchmark: Benchmark, path: str, *, method: str, title: str, note: str) -> None:
    headline = benchmark.headline
    curves: dict[str, dict[float, float]] = {}
    bands: dict[str, dict[float, tuple[float, float]]] = {}
    rivals: dict[str, float] = {}
    for outcome in outcomes:
        for (name, alpha), result in outcome.results.items():
            if alpha is None:
                rivals[f"{name}, {outcome.variant.label}"] = result.metrics[headline]
            elif name == method:
                curves.setdefault(outcome.variant.label, {})[alpha] = result.metrics[headline]
                bands.setdefault(outcome.variant.label, {})[alpha] = result.intervals[headline]
    if curves:
        plots.alpha_curve(curves, headline, title=title, path=path, intervals=bands, rivals=rivals, note=note)


def _scores(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "encoder": outcome.variant.label,
            "method": method,
            "alpha": alpha,
            "chosen": outcome.chosen[method] == alpha,
            "metrics": result.metrics,
            "intervals": result.intervals,
            "protocol": result.protocol,
        }
        for (method, alpha), result in outcome.results.items()
    ]


def log_variant(tracker: tracking.Tracker, outcome: Outcome, headline: str) -> None:
    """Log every metric: those of a sweep as a curve whose step is 100 x alpha, and the chosen ones by name."""
    series: dict[int, dict[str, float]] = {}
    for (method, alpha), result in outcome.results.items():
        step = round(100 * (alpha or 0.0))
        series.setdefault(step, {}).update({f"{method}/{key}": value for key, value in result.metrics.items()})
    tracker.log_series(sorted(series.items()))
    for method, alpha in outcome.chosen.items():
        best = outcome.best(method)
        low, high = best.intervals[headline]
        chosen = {f"chosen/{method}/{headline}": best.metrics[headline], f"chosen/{method}/low": low}
        chosen |= {f"chosen/{method}/high": high} | ({} if alpha is None else {f"chosen/{method}/alpha": alpha})
        tracker.log_metrics(chosen)
    tracker.finish()
