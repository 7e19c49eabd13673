"""Lists of image URIs, as CSV or Parquet: cut into slices that are read alone, and read row by row.

Columns, in any case and order: `uri`, `url`, `image_uri` or `image_url`; optionally `key` or `id` (without it the
key is the URI as the list gives it, less credentials and query) and `caption`, `text` or `txt`. A CSV has a header,
commas and RFC 4180 quotes. Where rows may point says `fetch.resolve`. A list is never held whole: of a list of 100
million rows one pass finds the slices of a CSV, the footer alone those of a Parquet file (whose row groups should
stay below some 100,000 rows: a slice inside one reads the group up to its own end).

A repeated key is told within each LIST_ROWS rows, counted from the first of the list, not within the whole list:
memory does not grow with the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cir_core import files
from cir_core.schema import CirError, Reject
from cir_core.shards.fetch import resolve
from cir_core.shards.list_rows import (
    URI_COLUMNS,
    ListRow,
    csv_columns,
    csv_records,
    holds_bytes,
    is_csv,
    parquet_columns,
    printable,
    range_rows,
)
from cir_core.shards.model import Slice, SliceBuilder, UnusableError
from cir_core.shards.parquet import IMAGE_COLUMNS, open_sound

LIST_ROWS = 4096
"""Rows of a slice unless the caller says otherwise, and of the windows in which a repeated key is told."""


@dataclass(frozen=True, slots=True)
class Link:
    """One row of a list. uri: absolute, or relative to the working directory as the list's own URI is; it opens.

    caption: None where the list has none; an empty cell of a CSV is none.
    """

    key: str
    uri: str
    caption: str | None = None


def is_uri_list(uri: str) -> bool:
    """Whether this is a list of image URIs: a .csv, or a .parquet with a column of URIs and none of image bytes.

    Raises CirError for a compressed CSV, and for a Parquet file that cannot be read.
    """
    name = files.redact(uri).lower()
    if ".csv." in name.rpartition("/")[2]:
        raise CirError(f"{files.redact(uri)}: a compressed CSV cannot be cut into slices; decompress it or use Parquet")
    if name.endswith(".csv"):
        return True
    if not name.endswith(".parquet"):
        return False
    with open_sound(uri, "shard") as file:
        schema = file.schema_arrow
    lower = {column.lower() for column in schema.names}
    has_images = any(holds_bytes(field.type) for field in schema if field.name in IMAGE_COLUMNS)
    return not has_images and any(column in lower for column in URI_COLUMNS)


def cut_uri_list(uri: str, slice_rows: int = LIST_ROWS) -> list[Slice]:
    """Cut a list into slices of `slice_rows` rows, good and bad ones; every row is in exactly one.

    Raises CirError for a list without a column of URIs, a damaged one, and a quote that is not closed.
    """
    builder = SliceBuilder(uri, slice_rows)
    if not is_csv(uri):
        with open_sound(uri, "list") as file:
            parquet_columns(file, files.redact(uri))
            rows = int(file.metadata.num_rows)
        starts = range(0, rows, slice_rows)
        return [Slice(uri, at, size, at, size, links=True) for at in starts for size in [min(slice_rows, rows - at)]]
    with files.open_stream(uri) as stream:
        records = csv_records(stream, files.redact(uri))
        csv_columns(next(records, None), files.redact(uri))
        for start, end, _ in records:
            builder.add(start, end)
    builder.close()
    return [replace(part, links=True) for part in builder.slices]


def read_links(part: Slice, *, require_caption: bool = False) -> Iterator[Link | Reject]:
    """Yield a Link or a Reject for each of the `part.num_rows` rows of a slice of `cut_uri_list`, in order.

    Nothing but the list is read. Raises CirError if the list was changed since it was cut.
    """
    count = 0
    for _, verdict in sort_links(range_rows(part), part.shard, require_caption=require_caption):
        count += 1
        yield verdict
    if count != part.num_rows:
        raise CirError(
            f"{files.redact(part.shard)}: the slice at {part.offset} no longer holds {part.num_rows} rows; the list "
            "was changed since it was cut: cut it again"
        )


def sort_links(rows: Iterator[ListRow], uri: str, *, require_caption: bool) -> Iterator[tuple[ListRow, Link | Reject]]:
    """Yield every row of a list with the Link or the Reject it becomes; `uri` is the list's."""
    kept, window, name = set[str](), -1, files.redact(uri)
    for row in rows:
        if row.number // LIST_ROWS != window:
            kept, window = set(), row.number // LIST_ROWS
        try:
            link = judge_link(row, uri, require_caption=require_caption)
            if link.key in kept:
                hint = (
                    ""
                    if row.key is not None
                    else "; the list has no key column, so the URI without its query is the key"
                )
                raise UnusableError("duplicate_key", f"row {row.number}{hint}")
        except UnusableError as fault:
            yield row, Reject(name, printable(row.key or files.redact(row.uri)), fault.reason, fault.detail)
        else:
            kept.add(link.key)
            yield row, link


def judge_link(row: ListRow, list_uri: str, *, require_caption: bool) -> Link:
    """Return the Link of a usable row; raise UnusableError otherwise. Repeated keys are the caller's to find."""
    place = f"row {row.number}"
    if row.problem is not None:
        raise UnusableError(*row.problem)
    if not row.uri:
        raise UnusableError("missing_uri", place)
    if not _is_utf8(row.uri):
        raise UnusableError("unsafe_uri", f"{place}: not UTF-8")
    uri = resolve(list_uri, row.uri)
    key = _default_key(list_uri, row.uri, uri) if row.key is None else row.key
    if not key:
        raise UnusableError("missing_key", place)
    if not _is_utf8(key):
        raise UnusableError("unsafe_path", f"{place}: the key is not UTF-8")
    if row.caption is None and require_caption:
        raise UnusableError("missing_caption", place)
    if row.caption is not None and not _is_utf8(row.caption):
        raise UnusableError("bad_caption_encoding", place)
    return Link(key, uri, row.caption)


def _default_key(list_uri: str, given: str, uri: str) -> str:
    if "://" in given or files.is_local(list_uri):
        return files.redact(given)
    return files.redact(uri)[len(files.redact(list_uri).rpartition("/")[0]) + 1 :]


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
