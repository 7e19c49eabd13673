"""What a catalogue run shows: its table, its contact sheet, its MLflow run. Nothing here reads more than some queries."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from cir_core import files
from cir_core.benchmarks import QuerySlice, read_query_slice
from cir_core.benchmarks.custom import is_picture
from cir_core.evaluation import load_ranking
from cir_core.reporting.contact_sheet import SheetColumn, SheetResult, SheetRow, image_ids_of, write_contact_sheet
from cir_core.schema import CirError, Query, Ranking
from cir_core.shards import fetch_image, find_images, list_shards
from jobs import tracking
from jobs.catalogue import CatalogueRun, label
from jobs.config import public
from jobs.session import say
from jobs.storage import RunFolder, absolute

if TYPE_CHECKING:
    from jobs.batch_retrieve import BatchRetrieveConfig

_SHEET = "contact_sheet.html"
_SHEET_K = 10
_SAMPLE_ROWS = 100


def write_sheet(config: BatchRetrieveConfig, run: CatalogueRun, parts: Sequence[QuerySlice], folder: RunFolder) -> None:
    """Write the contact sheet: the first queries of parts that are spread evenly over all."""
    chosen = np.unique(np.linspace(0, len(parts) - 1, min(config.contact_sheet_rows, len(parts))).round().astype(int))
    images = absolute(config.gallery_images) if config.gallery_images else ""
    picked = {int(number): parts[number] for number in chosen}
    missing = ray.get(_make_sheet.remote(run, picked, config.contact_sheet_rows, images, folder.path(_SHEET)))
    if missing is None:
        say("no contact sheet: the chosen queries were all rejected")
    elif missing:
        way_out = "they are not in --gallery_images" if images else "--gallery_images shows them: the store's own input"
        say(f"the contact sheet has {missing} images without a picture; {way_out}")


@ray.remote(num_cpus=1, max_retries=5)
def _make_sheet(
    run: CatalogueRun, picked: dict[int, QuerySlice], num_rows: int, gallery_images: str, uri: str
) -> int | None:
    """Find rows and pictures and write the page; return how many images have no picture, None if there is no row."""
    share = -(-num_rows // len(picked))
    rows = [row for number, part in picked.items() for row in _sheet_rows(run, number, part, share)][:num_rows]
    if not rows:
        return None
    wanted = set(image_ids_of(rows))
    inside = {name for name in wanted if not is_picture(name)}
    pictures: dict[str, bytes | None] = dict.fromkeys(wanted)
    pictures |= _gallery_pictures(gallery_images, inside) if gallery_images else {}
    for name in (one for one in wanted if pictures[one] is None and is_picture(one)):
        with suppress(Exception):  # a gallery id that looks like a path: shown by its name
            pictures[name] = fetch_image(name)
    rows = [replace(row, reference_id=public(row.reference_id)) for row in rows]  # no secret of a URI on the page
    pictures = {public(name): data for name, data in pictures.items()}
    write_contact_sheet(uri, f"custom: {label(*run.settings[0])}", rows, pictures, protocol=run.made)
    return sum(data is None for data in pictures.values())


def _sheet_rows(run: CatalogueRun, number: int, part: QuerySlice, share: int) -> list[SheetRow]:
    """Return the first answered queries of a part with their results under the first setting."""
    method, alpha = run.settings[0]
    ranking = load_ranking(files.join(run.folder, "results", method, f"part-{number:05d}.parquet")).get(alpha)
    if ranking is None:  # no query of the part was answered
        return []
    queries = {query.query_id: query for query in read_query_slice(part)}
    names = ranking.query_ids[:share]
    return [_sheet_row(ranking, row, queries[name]) for row, name in enumerate(names)]


def _sheet_row(ranking: Ranking, row: int, query: Query) -> SheetRow:
    ids = [str(one) for one in ranking.image_ids[row] if one != ""]
    hits = [one in query.target_ids for one in ids]
    places = list(zip(ids, ranking.scores[row].tolist(), hits, strict=False))[:_SHEET_K]
    first = hits.index(True) + 1 if True in hits else 0
    name = label(str(ranking.protocol["method"]), ranking.protocol["alpha"])  # type: ignore[arg-type] # float or None
    column = SheetColumn(name, tuple(SheetResult(*place) for place in places), first, len(ids))
    return SheetRow(query.query_id, query.reference_id, query.relative_caption, query.target_ids, (column,))


def _gallery_pictures(uri: str, wanted: set[str]) -> dict[str, bytes | None]:
    """Return pictures by key: of shards, read one after the other until all are found; or of a folder's files."""
    try:
        shards = list_shards(uri)
    except CirError:  # no shards: a folder of pictures, whose keys are paths in it
        places = {name: files.join(uri, name) for name in wanted}
        return {name: files.read_bytes(path) for name, path in places.items() if files.exists(path)}
    return {**find_images(shards, wanted)}


def publish(
    tracker: tracking.Tracker, folder: RunFolder, run: CatalogueRun, result: dict[str, Any], speed: Mapping[str, float]
) -> None:
    """Log counts, speed, scores, what approximate search found, the contact sheet and a sample, and close the run."""
    counts = {key: float(value) for key, value in result.items() if key.startswith("num_")}
    tracker.log_metrics(counts | dict(speed))
    for setting, scores in result["scores"].items():
        name = setting.replace("@", "_at_")
        tracker.log_metrics({f"{name}/{metric}": mean for metric, (mean, _, _) in scores.items()})
    for setting, measured in result.get("approximate", {}).get("recall", {}).items():
        name = setting.replace("@", "_at_")
        for metric, interval in measured.items():
            shown = zip(("", "_low", "_high"), interval, strict=True)
            tracker.log_metrics({f"{name}/{metric}{which}": value for which, value in shown})
    tracker.log_table(_sample(run), "results_sample.json")
    with tempfile.TemporaryDirectory() as local:
        for file in ("result.json", _SHEET):
            if files.exists(folder.path(file)):
                Path(local, file).write_bytes(files.read_bytes(folder.path(file)))
        tracker.log_folder(local)
    tracker.finish()


def _sample(run: CatalogueRun) -> dict[str, list[Any]]:
    with files.open_parquet(
        files.join(run.folder, "results", run.settings[0][0], "part-00000.parquet"), "results"
    ) as file:
        batch = next(file.iter_batches(_SAMPLE_ROWS), None)
        table: dict[str, list[Any]] = {} if batch is None else batch.to_pydict()
    return table


def results_table(result: dict[str, Any], folder: RunFolder, page: str) -> None:
    """Print counts, scores and where to look next."""
    table = Table(title="custom queries", show_header=False)
    for key in ("num_queries", "num_answered", "num_rejects", "num_truncated", "num_empty_captions", "num_parts"):
        table.add_row(key.removeprefix("num_").replace("_", " "), str(result[key]))
    for setting, scores in result["scores"].items():
        for metric, (mean, low, high) in scores.items():
            table.add_row(f"{setting} {metric}", f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    approximate = result.get("approximate", {})
    for setting, measured in approximate.get("recall", {}).items():
        for metric, (mean, low, high) in measured.items():
            table.add_row(f"{setting} {metric}", f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    if approximate:
        table.add_row("search", approximate["search"])
        table.add_row("recall measured on", f"{approximate['num_sampled']} queries, against exact search")
    console = Console(width=140)
    console.print(table)
    say(f"results: {public(folder.path('results'))}\nMLflow: {page}")
