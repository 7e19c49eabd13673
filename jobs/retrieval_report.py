"""What a retrieval run keeps: plots, contact sheets, scores, submission files, MLflow runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from cir_core import files
from cir_core.benchmarks import Benchmark
from cir_core.evaluation import has_test_server, write_submission
from cir_core.reporting import contact_sheet, plots
from cir_core.shards import find_images, list_shards
from jobs import tracking
from jobs.retrieval_outcomes import Outcome, averaged, by_part, by_variant, flat_protocol, groups_of
from jobs.retrieval_tables import SCENES_NOTE


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


def gallery_pictures(benchmark: Benchmark, wanted: frozenset[str]) -> dict[str, bytes]:
    """Return the encoded pictures of some images; of a crop, what the encoder saw of the picture."""
    if benchmark.images is not None:
        found = benchmark.image_files(sorted(wanted))
        return {name: _cut_out(benchmark, name, files.read_bytes(file.uri)) for name, file in found.items()}
    return find_images(list_shards(benchmark.image_shards), wanted)


def _cut_out(benchmark: Benchmark, image_id: str, data: bytes) -> bytes:
    crop = benchmark.crops.get(image_id)
    if crop is None:
        return data
    with Image.open(io.BytesIO(data)) as image, io.BytesIO() as out:
        crop.cut(image.convert("RGB")).save(out, "PNG")
        return out.getvalue()


def write_report(outcomes: Sequence[Outcome], *, method: str, num_rows: int) -> None:
    """Write each part's plot and contact sheet of one method, and all scores with their protocol, below the local folder."""
    scores: list[dict[str, Any]] = []
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
        scores += [score for outcome in held for score in _scores(outcome)]
    for group in groups_of(outcomes).values():
        for held in by_variant(group).values():
            if held[0].results and len(held) > 1:
                scores += [_mean_score(held, name) for name in held[0].chosen]
    files.write_json(f"{outcomes[0].local}/scores.json", scores)


def write_submissions(outcomes: Sequence[Outcome]) -> list[str]:
    """Write the test server's files of every method at its reported alpha; return their paths below the local folder."""
    written = []
    for outcome in outcomes:
        if outcome.benchmark.has_targets or not has_test_server(outcome.benchmark):
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
            "protocol": result.protocol,
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
) -> None:
    """Log a child run for every part, encoder and method, and for means: parameters say what it is, metrics what it scored.

    A child's metrics are those at the reported alpha; its sweep is the curves `sweep/<metric>`, whose step is 100 x alpha.
    The parent has the shown method's metrics with the last encoder, averaged over categories.
    """
    scored = [outcome for outcome in outcomes if outcome.results]
    for outcome in scored:
        for method in outcome.chosen:
            about = _about(outcome, method) | {"part": outcome.part.label}
            label = " ".join(filter(None, [outcome.part.label, method, outcome.variant.label]))
            child = start(name=f"{name} {label}", parameters=about, parent=parent)
            series = [
                (round(100 * other), {f"sweep/{key}": value for key, value in result.metrics.items()})
                for (one, other), result in sorted(outcome.results.items(), key=lambda item: item[0][1] or 0.0)
                if one == method and other is not None
            ]
            child.log_series(series)
            low, high = outcome.best(method).intervals[outcome.benchmark.headline]
            child.log_metrics(outcome.best(method).metrics | {"headline_low": low, "headline_high": high})
            child.finish()
    for group, held in groups_of(scored).items():
        for variant, parts in by_variant(held).items():
            for method in parts[0].chosen if len(parts) > 1 else []:
                about = _about(parts[0], method) | {"part": f"mean {group}".strip()}
                for key in ("category", "task", "gallery_size", "store"):
                    about.pop(key, None)
                child = start(name=f"{name} mean {group} {method} {variant}", parameters=about, parent=parent)
                child.log_metrics({key: mean for key, (mean, _, _) in averaged(parts, method).items()})
                child.finish()
    for held in by_part(outcomes):
        table = per_query_columns(held, shown)
        parent.log_table(table, held[0].part.below("per_query") + ".json")
    if scored:
        last = list(by_variant(next(iter(groups_of(scored).values()))).values())[-1]
        parent.log_metrics({key: mean for key, (mean, _, _) in averaged(last, shown).items()})


def _about(outcome: Outcome, method: str) -> dict[str, Any]:
    return {"encoder": outcome.variant.label} | flat_protocol(outcome, method)
