"""Rows of a list of image URIs as they are stored, from CSV or Parquet; what they are worth says `uri_list`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cir_core import files
from cir_core.schema import CirError
from cir_core.shards.model import Slice
from cir_core.shards.parquet import CAPTION_COLUMNS, KEY_COLUMNS, open_sound, raw_text

URI_COLUMNS = ("uri", "url", "image_uri", "image_url")
MAX_HEADER = 1 << 16
_READ_BYTES = 1 << 20
_MAX_LINE = 1 << 20
_BATCH_ROWS = 4096
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ListRow:
    """A row as stored. start, end: its place in the units of Slice.offset. Text that is not UTF-8 holds surrogates."""

    number: int
    start: int
    end: int
    uri: str = ""
    key: str | None = None  # None: the list has no such column
    caption: str | None = None
    problem: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class _Columns:
    """Positions in the header."""

    names: tuple[str, ...]
    uri: int
    key: int | None
    caption: int | None


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes, maybe in a struct or a dictionary."""
    if pa.types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(holds_bytes(kind.field(index).type) for index in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def printable(text: str) -> str:
    """Return text whose surrogates, bytes that are not UTF-8, are replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def list_rows(uri: str) -> Iterator[ListRow]:
    """Stream the rows of a whole list."""
    if not is_csv(uri):
        yield from _parquet_rows(uri, 0, None)
        return
    name = files.redact(uri)
    with files.open_stream(uri) as stream:
        records = csv_records(stream, name)
        columns = csv_columns(next(records, None), name)
        yield from _csv_rows(records, columns, 0)


def range_rows(part: Slice) -> Iterator[ListRow]:
    """Yield the rows in the range of a slice; one ranged read of a CSV and one of its header."""
    if not is_csv(part.shard):
        yield from _parquet_rows(part.shard, part.offset, part.offset + part.length)
        return
    name = files.redact(part.shard)
    head = io.BytesIO(files.read_bytes(part.shard, MAX_HEADER))
    columns = csv_columns(next(csv_records(head, name), None), name)
    data = io.BytesIO(files.read_range(part.shard, part.offset, part.length))
    yield from _csv_rows(csv_records(data, name, part.offset), columns, part.first_row)


def is_csv(uri: str) -> bool:
    """Whether a list is a CSV; if not, it is Parquet."""
    return files.redact(uri).lower().endswith(".csv")


def _find_columns(names: Sequence[str], name: str) -> _Columns:
    lower = [column.strip().lower() for column in names]

    def find(candidates: tuple[str, ...]) -> int | None:
        return next((lower.index(candidate) for candidate in candidates if candidate in lower), None)

    uri = find(URI_COLUMNS)
    if uri is None:
        raise CirError(
            f"unreadable list {name}: no column of URIs; expected one of {', '.join(URI_COLUMNS)}, "
            f"found {printable(', '.join(names))[:200] or 'no column'}"
        )
    return _Columns(tuple(names), uri, find(KEY_COLUMNS), find(CAPTION_COLUMNS))


def parquet_columns(file: pq.ParquetFile, name: str) -> _Columns:
    """Find the columns of a Parquet list; CirError if there is none of URIs or one has the wrong type."""
    columns = _find_columns(file.schema_arrow.names, name)
    for position in (columns.uri, columns.key, columns.caption):
        if position is None:
            continue
        if columns.names.count(columns.names[position]) > 1:
            raise CirError(
                f"unreadable list {name}: column {columns.names[position]} is there twice; rename one of them"
            )
        kind = file.schema_arrow.field(position).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (_is_text(kind) or pa.types.is_integer(kind)):
            raise CirError(f"unreadable list {name}: column {columns.names[position]} is {kind}, expected string")
    return columns


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or holds_bytes(kind))


def _parquet_rows(uri: str, first: int, stop: int | None) -> Iterator[ListRow]:
    """Yield the rows [first, stop) of a Parquet list, decoding no row group before `first` or after `stop`."""
    with open_sound(uri, "list", buffer_bytes=_READ_BYTES) as file:  # in pieces: a slice may end early
        columns = parquet_columns(file, files.redact(uri))
        number = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if number + size <= first:
                number += size
                continue
            for batch in _batches(file, group, columns):
                if stop is not None and number >= stop:
                    return
                skipped = max(0, first - number)
                kept = batch.slice(skipped, None if stop is None else max(0, stop - number - skipped))
                yield from _batch_rows(kept, columns, number + skipped)
                number += batch.num_rows


def _batches(file: pq.ParquetFile, group: int, columns: _Columns) -> Iterator[pa.RecordBatch]:
    wanted = [
        columns.names[position] for position in (columns.uri, columns.key, columns.caption) if position is not None
    ]
    yield from file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=wanted, use_threads=False)


def _batch_rows(batch: pa.RecordBatch, columns: _Columns, number: int) -> Iterator[ListRow]:
    def text(position: int | None) -> list[str | None]:
        if position is None:
            return [None] * int(batch.num_rows)
        raw = raw_text(batch.column(columns.names[position]))
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]

    cells = zip(text(columns.uri), text(columns.key), text(columns.caption), strict=True)
    for row, (uri, key, caption) in enumerate(cells, start=number):
        stated = None if columns.key is None else key or ""
        yield ListRow(row, row, row + 1, (uri or "").strip(), stated, caption)


def csv_columns(header: tuple[int, int, list[str]] | None, name: str) -> _Columns:
    """Find the columns in the first record of a CSV; CirError if there is none of URIs."""
    if header is None or not header[2]:
        raise CirError(f"unreadable list {name}: it is empty or has no header; expected one with a column uri")
    if header[1] > MAX_HEADER:
        raise CirError(
            f"unreadable list {name}: a header of more than {MAX_HEADER} bytes; expected the names of columns"
        )
    return _find_columns(header[2], name)


def _csv_rows(records: Iterator[tuple[int, int, list[str]]], columns: _Columns, first: int) -> Iterator[ListRow]:
    for number, (start, end, cells) in enumerate(records, start=first):
        if len(cells) != len(columns.names):
            found = f"{len(cells)} cells" if cells else "a carriage return outside quotes"
            fault = ("bad_row", f"row {number}: {found}, expected {len(columns.names)} cells")
            yield ListRow(number, start, end, problem=fault)
            continue
        key = None if columns.key is None else cells[columns.key]
        caption = None if columns.caption is None else cells[columns.caption] or None
        yield ListRow(number, start, end, cells[columns.uri].strip(), key, caption)


def csv_records(stream: BinaryIO, name: str, position: int = 0) -> Iterator[tuple[int, int, list[str]]]:
    """Yield (start, end, cells) of each record in bytes from the start of the file; blank lines are none, bad ones [].

    The csv module takes from `text` just the lines that the record under way needs, which is how its end is known.
    """
    start = position

    def text() -> Iterator[str]:
        nonlocal position
        for line in _lines(stream, name):
            at_start, position = position == 0, position + len(line)
            if at_start and line.startswith(_GZIP):
                raise CirError(f"unreadable list {name}: it is compressed; decompress it, or use Parquet")
            yield (line.removeprefix(_BOM) if at_start else line).decode("utf-8", "surrogateescape")

    reader = csv.reader(text())
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "new-line character" not in str(error):
                what = f"the row at byte {start}: {error}; is a quote not closed?"
                raise CirError(f"unreadable list {name}: {what}") from None
            yield start, position, []  # a carriage return outside quotes spoils its own row and no other
        else:
            if cells is None:
                return
            if cells:
                yield start, position, cells
        start = position


def _lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(_READ_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n"
        if len(rest) > _MAX_LINE:
            raise CirError(f"unreadable list {name}: a line of more than {_MAX_LINE} bytes; expected a CSV")
    if rest:
        yield rest
