"""Contact sheets: one HTML page that shows queries with their results as pictures, for people to look at.

The page is self-contained: pictures are data URIs, the style is inline, there are no scripts and no links. So
it opens from a disk, an object store or an artifact viewer's sandboxed frame.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import jinja2
import numpy as np
from PIL import Image, ImageOps

from cir_core import files
from cir_core.benchmarks import Benchmark
from cir_core.evaluation import apply_protocol
from cir_core.metrics import first_hit_rank, hits
from cir_core.schema import CirError, Ranking

THUMBNAIL_PX = 96
SHOWN_TARGETS = 4  # of a query's right answers; the page says how many more there are
_MAX_PIXELS = 64_000_000  # a picture larger than this is not decoded
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")
_QUALITY = 78  # WebP: about 2 KB for a photo of 96 px


@dataclass(frozen=True, slots=True)
class SheetResult:
    """One place of a result list."""

    image_id: str
    score: float
    hit: bool


@dataclass(frozen=True, slots=True)
class SheetColumn:
    """One method's results for a query. first_hit: the best-placed target's rank in the list, 0 if none."""

    label: str
    results: tuple[SheetResult, ...]
    first_hit: int
    list_length: int


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One query: its reference, what was asked, the right answers, and the results of one or more methods."""

    query_id: str
    reference_id: str
    relative_caption: str
    target_ids: tuple[str, ...]
    columns: tuple[SheetColumn, ...]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class _Picture:
    image_id: str
    uri: str  # data URI; "" where there is none
    known: bool = True  # whether there were bytes, if only bytes that could not be decoded


@dataclass
class _Album:
    """Thumbnails by image id, made once each."""

    images: Mapping[str, bytes | None]
    thumbnail_px: int
    pictures: dict[str, _Picture] = field(default_factory=dict)

    def __call__(self, image_id: str) -> _Picture:
        if image_id not in self.pictures:
            if image_id not in self.images:
                raise CirError(f"contact sheet: no picture of {image_id!r}; pass the bytes of image_ids_of(rows)")
            data = self.images[image_id]
            uri = _data_uri(data, self.thumbnail_px) if data is not None else ""
            self.pictures[image_id] = _Picture(image_id, uri, known=data is not None)
        return self.pictures[image_id]

    @property
    def unreadable(self) -> list[str]:
        return sorted(picture.image_id for picture in self.pictures.values() if picture.known and not picture.uri)


def contact_sheet_rows(
    rankings: Mapping[str, Ranking],
    benchmark: Benchmark,
    *,
    k: int = 10,
    num_rows: int = 40,
    query_ids: Sequence[str] | None = None,
) -> tuple[SheetRow, ...]:
    """Return rows for `write_contact_sheet`, with the benchmark's protocol applied to each ranking.

    rankings: {label: ranking} side by side, such as {"before TAT": ..., "after TAT": ...}.
    query_ids: which queries; by default `num_rows` spread evenly over the benchmark, so that nobody picked
    them.
    Raises CirError for no rankings, unknown query ids, k or num_rows below 1, and every fault that
    `apply_protocol` finds.
    """
    if not rankings or k < 1 or num_rows < 1:
        raise CirError(
            f"contact sheet: {len(rankings)} rankings, k = {k}, num_rows = {num_rows}; all must be at least 1"
        )
    place = {query.query_id: row for row, query in enumerate(benchmark.queries)}
    if query_ids is None:
        spread = np.linspace(0, len(place) - 1, min(num_rows, len(place)))
        chosen = [int(row) for row in np.unique(spread.round())]
    else:
        if unknown := [name for name in query_ids if name not in place]:
            raise CirError(f"{benchmark}: no such query: {', '.join(map(repr, unknown[:3]))}")
        chosen = [place[name] for name in query_ids]
    columns = {label: _columns(label, ranking, benchmark, chosen, k) for label, ranking in rankings.items()}
    rows = []
    for number, row in enumerate(chosen):
        query = benchmark.queries[row]
        rows.append(
            SheetRow(
                query_id=query.query_id,
                reference_id=query.reference_id,
                relative_caption=query.relative_caption,
                target_ids=query.target_ids,
                columns=tuple(columns[label][number] for label in rankings),
                kind=benchmark.query_kinds.get(query.query_id, ""),
            )
        )
    return tuple(rows)


def image_ids_of(rows: Iterable[SheetRow]) -> frozenset[str]:
    """Return the ids of every picture that the rows show: read these before `write_contact_sheet`."""
    shown: set[str] = set()
    for row in rows:
        shown.update((row.reference_id, *row.target_ids[:SHOWN_TARGETS]))
        shown.update(result.image_id for column in row.columns for result in column.results)
    return frozenset(shown)


def write_contact_sheet(
    path: str,
    title: str,
    rows: Sequence[SheetRow],
    images: Mapping[str, bytes | None],
    *,
    note: str = "",
    protocol: Mapping[str, object] | None = None,
    thumbnail_px: int = THUMBNAIL_PX,
) -> None:
    """Write the page to `path` (a local path or any URI), atomically.

    images: encoded bytes by image id, at least those of `image_ids_of(rows)`. One that cannot be decoded is
    shown as an empty frame that says so, and counted at the head of the page; one that is missing is a
    CirError naming it. None instead of bytes shows a frame with the id.
    note: a line under the title. protocol: names and values listed at the foot. All text is escaped.
    thumbnail_px: longest side of a picture, 16 to 512. 40 rows of 10 results take about 1.5 MB at the
    default.
    """
    if not rows:
        raise CirError("contact sheet: no rows to show")
    if not 16 <= thumbnail_px <= 512:
        raise CirError(f"contact sheet: thumbnail_px must lie between 16 and 512, not {thumbnail_px}")
    album = _Album(images, thumbnail_px)
    for image_id in sorted(image_ids_of(rows)):
        album(image_id)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cir_core", "reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("contact_sheet.jinja").render(
        title=title, note=note, rows=rows, picture=album, protocol=protocol or {},
        unreadable=album.unreadable, thumbnail_px=thumbnail_px, shown_targets=SHOWN_TARGETS,
    )  # fmt: skip
    files.write_bytes(path, page.encode())


def _columns(label: str, ranking: Ranking, benchmark: Benchmark, chosen: Sequence[int], k: int) -> list[SheetColumn]:
    scored = apply_protocol(ranking, benchmark)
    ids, scores = scored.image_ids[chosen], scored.scores[chosen]
    targets = [benchmark.queries[row].target_ids for row in chosen]
    found, first = np.zeros(ids.shape, dtype=np.bool_), np.zeros(len(chosen), dtype=np.int64)
    answered = [row for row, known in enumerate(targets) if known]
    if answered:
        known = [targets[row] for row in answered]
        found[answered], first[answered] = hits(ids[answered], known), first_hit_rank(ids[answered], known)
    columns = []
    for row in range(len(chosen)):
        places = [place for place in range(min(k, ids.shape[1])) if ids[row, place] != ""]
        results = tuple(
            SheetResult(str(ids[row, place]), float(scores[row, place]), bool(found[row, place])) for place in places
        )
        columns.append(SheetColumn(label, results, int(first[row]), int((ids[row] != "").sum())))
    return columns


def _data_uri(data: bytes, thumbnail_px: int) -> str:
    """Return a WebP thumbnail as a data URI; "" where the bytes are no picture or it is too large."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                return ""
            image.draft("RGB", (2 * thumbnail_px, 2 * thumbnail_px))  # JPEG: decode at a fraction of the size
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey: converting would clip it to white
                upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
            rgba = upright.convert("RGBA")
            rgba.thumbnail((thumbnail_px, thumbnail_px))
    except Exception:  # Pillow's plugins raise nearly everything on damaged files
        return ""
    flat = Image.new("RGB", rgba.size, "white")
    flat.paste(rgba, mask=rgba.getchannel("A"))
    buffer = io.BytesIO()
    flat.save(buffer, format="WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
