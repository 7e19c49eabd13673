"""Queries files, JSON Lines or Parquet: streamed, checked row by row, cut into slices that can be read alone.

A row: query_id, reference, relative_caption (text), and optionally target_ids, subset_ids (lists of text) and kind
(text); an optional value may be null. JSON Lines is UTF-8 with one object a line; blank lines, CRLF line ends and a
byte order mark are allowed. Parquet has these columns. Whatever else a row holds is a CirError that names the file,
the line or row (from 1), the query and what is wrong.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from cir_core import files
from cir_core.benchmarks.base import near_matches
from cir_core.embedding_store import hash_ids
from cir_core.schema import CirError, Query
from cir_core.shards import list_shards

SUFFIXES = (".jsonl", ".parquet")
_REQUIRED = ("query_id", "reference", "relative_caption")
_LISTS = ("target_ids", "subset_ids")
_KNOWN = (*_REQUIRED, *_LISTS, "kind")
_READ_BYTES = 1 << 20
_MAX_LINE_BYTES = 16 << 20  # a line is held whole; a file without line ends must not fill the memory
_BATCH_ROWS = 4096
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class QuerySlice:
    """A run of consecutive queries of one file that can be read alone.

    number: its place among the file's slices. first_line: its first line or row, from 1, as messages count. start, stop:
    its bytes in JSON Lines, its rows from 0 in Parquet. digest: SHA-256 of its queries, the same for both formats.
    """

    uri: str
    number: int
    first_line: int
    start: int
    stop: int
    num_queries: int
    digest: str


@dataclass(frozen=True, slots=True)
class QueryCounts:
    """What some queries have. The examples name the first query with or without, for messages; "" is none."""

    num_queries: int
    num_with_targets: int
    num_with_subsets: int
    num_empty_captions: int
    without_targets: str = ""
    without_subsets: str = ""

    @classmethod
    def of(cls, queries: Iterable[Query], where: str) -> QueryCounts:
        """Count queries of one file. where: the file, for the examples."""
        rows = list(queries)
        lacking = [
            next((f"query {query.query_id!r} of {where}" for query in rows if not getattr(query, name)), "")
            for name in _LISTS
        ]
        return cls(
            len(rows),
            sum(bool(query.target_ids) for query in rows),
            sum(bool(query.subset_ids) for query in rows),
            sum(not query.relative_caption.strip() for query in rows),
            *lacking,
        )

    @classmethod
    def total(cls, parts: Iterable[QueryCounts]) -> QueryCounts:
        """Add up; the examples are the first there are."""
        columns = list(zip(*map(astuple, parts), strict=True)) or [(0,)] * 4 + [("",)] * 2
        sums = [sum(column) for column in columns[:4]]
        return cls(*sums, *(next(filter(None, column), "") for column in columns[4:]))

    @property
    def have_targets(self) -> bool:
        """Whether every query has targets; CirError naming the first without, where some have."""
        return self._all_or_none(self.num_with_targets, "target_ids", self.without_targets)

    @property
    def have_subsets(self) -> bool:
        """Whether every query ranks only its own subset_ids; CirError naming the first without, where some do."""
        return self._all_or_none(self.num_with_subsets, "subset_ids", self.without_subsets)

    def _all_or_none(self, number: int, column: str, without: str) -> bool:
        if 0 < number < self.num_queries:
            raise CirError(
                f"{number} of {self.num_queries} queries have {column}, {without} has none: give them to every query "
                "or to none, or put the two kinds in files that are answered apart"
            )
        return number > 0


@dataclass(frozen=True, slots=True)
class QueryFilePlan:
    """A queries file that was read and checked once. digest: of all its queries, in order, the same for both formats."""

    uri: str
    slices: tuple[QuerySlice, ...]
    counts: QueryCounts
    digest: str


@dataclass(frozen=True, slots=True)
class _Row:
    """A query, its kind ("" without one), its line or row from 1, and its place in the units of QuerySlice."""

    query: Query
    kind: str
    line: int
    start: int
    stop: int


def list_query_files(uri: str | Sequence[str]) -> list[str]:
    """Return the queries files of a file, a folder, a glob, a brace range or a list of these, each once.

    Raises CirError as `list_shards` does.
    """
    return list_shards(uri, suffixes=SUFFIXES)


def read_queries(uri: str) -> tuple[tuple[Query, ...], dict[str, str]]:
    """Read a whole queries file; return its queries in file order and the kind of each query that names one.

    An empty relative_caption is allowed. Raises CirError for a faulty row.
    """
    rows = list(_rows(uri))
    return tuple(row.query for row in rows), {row.query.query_id: row.kind for row in rows if row.kind}


def plan_query_file(
    uri: str, rows_per_slice: int = 4096, *, visit: Callable[[Sequence[Query]], None] | None = None
) -> QueryFilePlan:
    """Read a file once, as a stream, check every row, and cut it into slices of `rows_per_slice` queries.

    visit: called with the queries of each slice, for checks of the caller's own in the same pass.
    Raises CirError for a faulty row, a query id that occurs twice, and a file without queries.
    """
    if rows_per_slice < 1:
        raise CirError(f"rows_per_slice must be at least 1, not {rows_per_slice}")
    name = files.redact(uri)
    slices: list[QuerySlice] = []
    counts: list[QueryCounts] = []
    hashes = []
    rows = _rows(uri)
    while chunk := list(itertools.islice(rows, rows_per_slice)):
        queries = [row.query for row in chunk]
        first, last = chunk[0], chunk[-1]
        slices.append(QuerySlice(uri, len(slices), first.line, first.start, last.stop, len(chunk), _digest(queries)))
        counts.append(QueryCounts.of(queries, name))
        hashes.append(hash_ids(pa.array([query.query_id for query in queries], pa.string())))
        if visit is not None:
            visit(queries)
    if not slices:
        raise CirError(f"{name}: holds no queries")
    _refuse_repeats(uri, np.concatenate(hashes))
    digest = hashlib.sha256("".join(part.digest for part in slices).encode()).hexdigest()
    return QueryFilePlan(uri, tuple(slices), QueryCounts.total(counts), digest)


def read_query_slice(part: QuerySlice) -> tuple[Query, ...]:
    """Read exactly the queries of a slice; CirError if the file is not the one that was planned."""
    if _is_parquet(part.uri):
        rows = _parquet_rows(part.uri, part.start, part.stop)
    else:
        data = files.read_range(part.uri, part.start, part.stop - part.start)
        rows = _jsonl_rows(data.split(b"\n"), files.redact(part.uri), part.first_line, part.start)
    queries: list[Query] = []
    fault = ""
    try:
        queries = [row.query for row in rows]
    except CirError as error:
        fault = f" ({error})"
    if fault or _digest(queries) != part.digest:
        raise CirError(
            f"{files.redact(part.uri)}: changed since it was checked{fault}; leave queries files alone while they are "
            "being answered, and run the command again"
        )
    return tuple(queries)


def _rows(uri: str) -> Iterator[_Row]:
    if _is_parquet(uri):
        yield from _parquet_rows(uri)
        return
    with files.open_stream(uri) as stream:
        name = files.redact(uri)
        yield from _jsonl_rows(iter_lines(stream, name), name, 1, 0)


def _is_parquet(uri: str) -> bool:
    return files.redact(uri).endswith(".parquet")


def iter_lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the lines of a stream without their line ends, reading blocks: not every file system can read lines."""
    rest = b""
    while data := stream.read(_READ_BYTES):
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
        if len(rest) > _MAX_LINE_BYTES:
            raise CirError(f"{name}: a line of more than {_MAX_LINE_BYTES >> 20} MiB; expected one JSON object a line")
    yield rest


def _jsonl_rows(lines: Iterable[bytes], name: str, first_line: int, offset: int) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=first_line):
        start, offset = offset, offset + len(line) + 1
        text = line.removeprefix(_BOM) if number == 1 else line
        if not text.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(text.decode(), object_pairs_hook=_distinct)
        except UnicodeDecodeError:
            raise CirError(f"{where}: not a JSON object in UTF-8") from None
        except (
            ValueError,
            RecursionError,
        ) as error:  # broken JSON, keys twice, depth and digits beyond Python's limits
            raise CirError(f"{where}: not a JSON object ({error})") from None
        if not isinstance(row, dict):
            raise CirError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield _row(row, where, number, start, start + len(line))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice")
    return row


def _parquet_rows(uri: str, start: int = 0, stop: int | None = None) -> Iterator[_Row]:
    """Yield the rows [start, stop) of a file, decoding only the row groups that hold them."""
    name = files.redact(uri)
    with files.open_parquet(uri, "queries file") as file:
        _check_columns(file.schema_arrow, name)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        stop = ends[-1] if ends and stop is None else stop or 0
        groups = [g for g, end in enumerate(ends) if end > start and end - sizes[g] < stop]
        row = ends[groups[0]] - sizes[groups[0]] if groups else 0
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups) if groups else ():
            low, high = max(start - row, 0), min(stop - row, batch.num_rows)
            if low < high:
                for place, values in enumerate(_values(batch.slice(low, high - low), name, row + low), start=row + low):
                    yield _row(values, f"{name}, row {place + 1}", place + 1, place, place + 1)
            row += batch.num_rows


def _values(batch: pa.RecordBatch, name: str, first: int) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        raise CirError(f"{name}, rows {first + 1} to {first + batch.num_rows}: text that is not UTF-8") from None
    return rows


def _check_columns(schema: pa.Schema, name: str) -> None:
    for column in schema.names:
        if column not in _KNOWN:
            raise CirError(f"{name}: unknown column {column!r}; {near_matches(column, _KNOWN)}")
    if len(set(schema.names)) < len(schema.names) or not set(_REQUIRED) <= set(schema.names):
        raise CirError(f"{name}: needs the columns {', '.join(_REQUIRED)}, each once; found {', '.join(schema.names)}")
    for field in schema:
        is_list = field.name in _LISTS
        if not (_is_text_list(field.type) if is_list else _is_text(field.type)):
            expected = "lists of strings" if is_list else "strings"
            raise CirError(f"{name}: column {field.name!r} must hold {expected}, found {field.type}")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )  # fmt: skip


def _is_text_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_null(kind)) or (hasattr(kind, "value_field") and _is_text(kind.value_type))


def _row(row: dict[str, Any], where: str, line: int, start: int, stop: int) -> _Row:
    for key in row:
        if key not in _KNOWN:
            raise CirError(f"{where}: unknown key {key!r}; {near_matches(key, _KNOWN)}")
    query_id = _text(row, "query_id", where)
    where = f"{where}, query {query_id!r}"
    query = Query(
        query_id=query_id,
        reference_id=_text(row, "reference", where),
        relative_caption=_text(row, "relative_caption", where, may_be_empty=True),
        target_ids=_names(row, "target_ids", where),
        subset_ids=_names(row, "subset_ids", where),
    )
    kind = "" if row.get("kind") is None else _text(row, "kind", where)
    return _Row(query, kind, line, start, stop)


def _text(row: dict[str, Any], key: str, where: str, *, may_be_empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not (value or may_be_empty):
        found = f"{value!r:.80}" if key in row else "no such key"
        raise CirError(f"{where}: {key} must be a {'' if may_be_empty else 'non-empty '}string, found {found}")
    if not _encodable(value):
        raise CirError(f"{where}: {key} holds half of a surrogate pair, which is no text: {value!r:.80}")
    return value


def _names(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) and one and _encodable(one) for one in value):
        raise CirError(f"{where}: {key} must be a list of non-empty strings, found {value!r:.80}")
    if len(set(value)) < len(value):
        noun = "target" if key == "target_ids" else "subset member"
        raise CirError(f"{where}: {noun} {next(one for one in value if value.count(one) > 1)!r} is listed twice")
    return tuple(value)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(queries: Iterable[Query]) -> str:
    digest = hashlib.sha256()
    for query in queries:
        digest.update(json.dumps(astuple(query)).encode() + b"\n")
    return digest.hexdigest()


def _refuse_repeats(uri: str, hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
    ordered = np.sort(hashes)
    suspects = ordered[1:][ordered[1:] == ordered[:-1]]
    if not suspects.size:
        return
    seen: dict[str, int] = {}  # equal hashes may be a coincidence: compare these few ids themselves
    for place, row in enumerate(_rows(uri)):
        if hashes[place] in suspects:
            first = seen.setdefault(row.query.query_id, row.line)
            if first != row.line:
                unit = "row" if _is_parquet(uri) else "line"
                raise CirError(
                    f"{files.redact(uri)}, {unit} {row.line}: query id {row.query.query_id!r} is listed twice, first "
                    f"in {unit} {first}; every query needs an id of its own"
                )
