"""What a retrieval run keeps: plots, contact sheets, scores, submission files, MLflow runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image

from cir_core import files
from cir_core.benchmarks import Benchmark
from cir_core.evaluation import has_test_server, write_submission
from cir_core.preprocessing import ImageError
from cir_core.reporting import contact_sheet, plots
from cir_core.schema import CirError
from cir_core.shards import fetch_image, find_images, list_shards
from jobs import tracking
from jobs.retrieval_outcomes import Outcome, averaged, by_part, by_variant, flat_protocol, groups_of
from jobs.retrieval_tables import SCENES_NOTE
from jobs.session import say


def per_query_columns(outcomes: Sequence[Outcome], method: str) -> dict[str, list[Any]]:
    """Return a part's per-query table: the query and, for each variant, the rank of its best-placed target (None: not listed)."""
    benchmark = outcomes[0].benchmark
    columns: dict[str, list[Any]] = {
        "query_id": [query.query_id for query in benchmark.queries],
        "kind": [benchmark.query_kinds.get(query.query_id, "") for query in benchmark.queries],
        "reference": [query.reference_id for query in benchmark.queries],
        "relative_caption": [query.relative_caption for query in benchmark.queries],
        "targets": [" ".join(query.target_ids) for query in benchmark.queries],
    }
    for outcome in outcomes:
        if outcome.results:
            columns[f"rank {outcome.variant.label}"] = outcome.best(method).per_query.column("rank").to_pylist()
    return columns


def gallery_pictures(benchmark: Benchmark, wanted: frozenset[str]) -> Mapping[str, bytes | None]:
    """Return the encoded pictures of some images, of a crop what the encoder saw of it; None for one that is gone."""
    if benchmark.images is None:
        return dict.fromkeys(wanted) | find_images(list_shards(benchmark.image_shards), wanted)
    pictures: dict[str, bytes | None] = dict.fromkeys(wanted)
    for name, file in benchmark.image_files(sorted(wanted), missing="skip").items():
        with suppress(CirError, OSError, ImageError):
            pictures[name] = _cut_out(benchmark, name, fetch_image(file.uri))
    return pictures


def _cut_out(benchmark: Benchmark, image_id: str, data: bytes) -> bytes:
    crop = benchmark.crops.get(image_id)
    if crop is None:
        return data
    with Image.open(io.BytesIO(data)) as image, io.BytesIO() as out:
        crop.cut(image.convert("RGB")).save(out, "PNG")
        return out.getvalue()


def write_report(outcomes: Sequence[Outcome], *, method: str, num_rows: int) -> None:
    """Write each part's plot and contact sheet of one method, and all scores with their protocol, below the local folder."""
    scores = [score for held in by_part(outcomes) for outcome in held for score in _scores(outcome)]
    for group in groups_of(outcomes).values():
        for held in by_variant(group).values():
            if held[0].results and len(held) > 1:
                scores += [_mean_score(held, name) for name in held[0].chosen]
    files.write_json(f"{outcomes[0].local}/scores.json", scores)
    for held in by_part(outcomes):
        first = held[0]
        note = SCENES_NOTE if first.benchmark.name == "scenes" else ""
        title = f"{first.benchmark.name} {first.benchmark.split} {first.part.label}".strip() + f": {method}"
        if first.results:
            _plot(held, f"{first.folder}/alpha.png", method=method, title=title, note=note)
        lists = {outcome.variant.label: outcome.ranking(method) for outcome in held}
        rows = contact_sheet.contact_sheet_rows(lists, first.benchmark, num_rows=num_rows)
        pictures = gallery_pictures(first.benchmark, contact_sheet.image_ids_of(rows))
        sheet, protocol = f"{first.folder}/contact_sheet.html", flat_protocol(held[-1], method)
        contact_sheet.write_contact_sheet(sheet, title, rows, pictures, note=note, protocol=protocol)


def write_submissions(outcomes: Sequence[Outcome]) -> list[str]:
    """Write the test server's files of every method at its reported alpha; return their paths below the local folder."""
    written = []
    for outcome in outcomes:
        if outcome.benchmark.has_targets or not has_test_server(outcome.benchmark):
            continue
        if left_out := len(outcome.part.reported.queries) - len(outcome.benchmark.queries):
            say(f"no files for the test server: it wants every query, and {left_out} were left out")
            continue
        for method in outcome.chosen:
            place = f"{outcome.folder}/submissions/{outcome.variant.label.replace(' ', '_')}/{method}"
            subsets = outcome.ranking(method, subset=True) if outcome.benchmark.max_subset_k else None
            written += write_submission(outcome.ranking(method), outcome.benchmark, place, subset_ranking=subsets)
    return [path.removeprefix(f"{outcomes[0].local}/") for path in written]


def _plot(outcomes: Sequence[Outcome], path: str, *, method: str, title: str, note: str) -> None:
    headline = outcomes[0].benchmark.headline
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
            "part": outcome.part.label,
            "encoder": outcome.variant.label,
            "method": method,
            "alpha": alpha,
            "chosen": outcome.chosen[method] == alpha,
            "metrics": result.metrics,
            "intervals": result.intervals,
            "not_applicable": result.not_applicable,
            "protocol": result.protocol | {"alpha_source": outcome.alpha_source},
        }
        for (method, alpha), result in outcome.results.items()
    ]


def _mean_score(outcomes: Sequence[Outcome], method: str) -> dict[str, Any]:
    means = averaged(outcomes, method)
    return {
        "part": f"mean {outcomes[0].part.group}".strip(),
        "mean_over": [outcome.part.label for outcome in outcomes],
        "encoder": outcomes[0].variant.label,
        "method": method,
        "alpha": outcomes[0].chosen[method],
        "chosen": True,
        "alpha_source": outcomes[0].alpha_source,
        "metrics": {name: mean for name, (mean, _, _) in means.items()},
        "intervals": {name: (low, high) for name, (_, low, high) in means.items()},
    }


def log_outcomes(
    outcomes: Sequence[Outcome],
    name: str,
    shown: str,
    *,
    start: Callable[..., tracking.Tracker],
    parent: tracking.Tracker,
    children: dict[str, tracking.Tracker],
) -> None:
    """Log a child run for every part, encoder and method, and for means: parameters say what it is, metrics what it scored.

    A child's metrics are those at the reported alpha; its sweep is the curves `sweep/<metric>`, whose step is 100 x alpha.
    children: the runs started so far, so that a second attempt goes on with them.
    The parent has the shown method's metrics with the last encoder, averaged over categories.
    """
    scored = [outcome for outcome in outcomes if outcome.results]
    for label, about, series, metrics in [*_single_runs(scored), *_mean_runs(scored)]:
        if label not in children:
            children[label] = start(name=f"{name} {label}", parameters=about, parent=parent)
        children[label].log_series(series)
        children[label].log_metrics(metrics)
        children[label].finish()
    for held in by_part(outcomes):
        table = per_query_columns(held, shown)
        parent.log_table(table, held[0].part.below("per_query") + ".json")
    if scored:
        last = list(by_variant(next(iter(groups_of(scored).values()))).values())[-1]
        parent.log_metrics({key: mean for key, (mean, _, _) in averaged(last, shown).items()})


Child = tuple[
    str, dict[str, Any], list[tuple[int, dict[str, float]]], dict[str, float]
]  # label, parameters, sweep, metrics


def _single_runs(outcomes: Sequence[Outcome]) -> Iterator[Child]:
    for outcome in outcomes:
        for method in outcome.chosen:
            about = _about(outcome, method) | {"part": outcome.part.label}
            by_alpha = {alpha: result for (name, alpha), result in outcome.results.items() if name == method}
            series = [
                (round(100 * alpha), {f"sweep/{key}": value for key, value in result.metrics.items()})
                for alpha, result in by_alpha.items()
                if alpha is not None
            ]
            best = outcome.best(method)
            low, high = best.intervals[outcome.benchmark.headline]
            label = " ".join(filter(None, [outcome.part.label, method, outcome.variant.label]))
            yield label, about, series, best.metrics | {"headline_low": low, "headline_high": high}


def _mean_runs(outcomes: Sequence[Outcome]) -> Iterator[Child]:
    for group, held in groups_of(outcomes).items():
        for variant, parts in by_variant(held).items():
            for method in parts[0].chosen if len(parts) > 1 else ():
                about = _about(parts[0], method) | {"part": f"mean {group}".strip()}
                same = [_about(part, method) for part in parts]
                about = {
                    key: value
                    for key, value in about.items()
                    if key == "part" or all(o.get(key) == value for o in same)
                }
                metrics = {key: mean for key, (mean, _, _) in averaged(parts, method).items()}
                yield " ".join(filter(None, ("mean", group, method, variant))), about, [], metrics


def _about(outcome: Outcome, method: str) -> dict[str, Any]:
    return {"encoder": outcome.variant.label} | flat_protocol(outcome, method)
