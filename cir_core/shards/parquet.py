"""Rows of a Parquet shard: key, image bytes and caption under any of their usual column names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cir_core import files
from cir_core.files.access import StorageError
from cir_core.schema import Reject, UnreadableError
from cir_core.shards.model import Row, ShardIndex, Slice, sort_rows

KEY_COLUMNS = ("key", "__key__", "id")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes")
CAPTION_COLUMNS = ("caption", "txt", "text")
_BYTES_TYPES = ("binary", "large_binary", "binary_view")
_TEXT_TYPES = ("string", "large_string", "string_view", *_BYTES_TYPES, "null")  # null: a column without one value
_WHOLE_NUMBERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_BUFFER_BYTES = 8 << 20  # of a column read at a time: row groups may be as large as the file
_BATCH_ROWS = 64  # decoded at a time; bounds memory inside large row groups, beside a page, of up to 1024 rows


@dataclass(frozen=True, slots=True)
class ParquetShard:
    """An open file with its columns resolved. image_column may be a path into a struct ("image.bytes")."""

    file: pq.ParquetFile
    key: str
    image: str
    caption: str | None

    @property
    def num_row_groups(self) -> int:
        """Number of row groups."""
        return int(self.file.num_row_groups)


@contextmanager
def open_parquet(uri: str, *, require_caption: bool) -> Iterator[ParquetShard]:
    """Open a shard; CirError if it is not Parquet, is damaged, or lacks a column, seen now or while reading."""
    with open_sound(uri, "shard", buffer_bytes=_BUFFER_BYTES) as file:
        yield _resolve(file, files.redact(uri), require_caption=require_caption)


@contextmanager
def open_sound(uri: str, what: str, *, buffer_bytes: int = 0) -> Iterator[pq.ParquetFile]:
    """Open a file as `files.open_parquet` does; whatever else pyarrow raises on damaged files is a CirError too."""
    try:
        with files.open_parquet(uri, what, buffer_bytes=buffer_bytes) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise UnreadableError(f"unreadable {what} {files.redact(uri)}: not a sound Parquet file ({error})") from None


def _resolve(file: pq.ParquetFile, name: str, *, require_caption: bool) -> ParquetShard:
    schema = file.schema_arrow

    def find(what: str, candidates: tuple[str, ...]) -> str:
        for candidate in candidates:
            if schema.names.count(candidate) > 1:
                raise UnreadableError(f"unreadable shard {name}: column {candidate} is there twice; rename one of them")
            if candidate in schema.names:
                return candidate
        raise UnreadableError(
            f"unreadable shard {name}: no {what} column; expected one of {', '.join(candidates)}, "
            f"found {', '.join(schema.names) or 'no column'}"
        )

    def check(column: str, found: pa.DataType, kinds: tuple[str, ...]) -> None:
        value = found.value_type if pa.types.is_dictionary(found) else found
        if str(value) not in kinds:
            raise UnreadableError(f"unreadable shard {name}: column {column} is {found}, expected {kinds[0]}")

    key, image = find("key", KEY_COLUMNS), find("image", IMAGE_COLUMNS)
    check(key, schema.field(key).type, (*_TEXT_TYPES, *_WHOLE_NUMBERS))
    has_caption = require_caption or any(column in schema.names for column in CAPTION_COLUMNS)
    caption = find("caption", CAPTION_COLUMNS) if has_caption else None
    if caption is not None:
        check(caption, schema.field(caption).type, _TEXT_TYPES)
    image_type = schema.field(image).type
    if pa.types.is_struct(image_type):  # Hugging Face data sets: struct<bytes, path>
        if image_type.get_field_index("bytes") < 0:
            raise UnreadableError(
                f"unreadable shard {name}: column {image} is {image_type}, expected a field 'bytes' in it"
            )
        image, image_type = f"{image}.bytes", image_type.field("bytes").type
    check(image, image_type, _BYTES_TYPES)
    return ParquetShard(file, key, image, caption)


def parquet_rows(shard: ParquetShard, row_groups: Iterable[int], *, load: bool) -> Iterator[Row]:
    """Yield the rows of the given row groups; Row.start is the row group. load: keep the image bytes."""
    columns = [column for column in (shard.key, shard.image, shard.caption) if column is not None]
    for group in row_groups:
        for batch in shard.file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
            yield from _batch_rows(shard, batch, group, load=load)


def _batch_rows(shard: ParquetShard, batch: pa.RecordBatch, group: int, *, load: bool) -> Iterator[Row]:
    keys = raw_text(batch.column(shard.key))
    top, _, inner = shard.image.partition(".")
    images = batch.column(top)
    if inner:
        images = pc.struct_field(images, inner)
    images = _plain(images)
    sizes = pc.binary_length(images).to_pylist()
    captions = raw_text(batch.column(shard.caption)) if shard.caption else [None] * len(keys)
    for index, (key, size, caption) in enumerate(zip(keys, sizes, captions, strict=True)):
        image = None if size is None else images[index].as_py() if load else b""
        name, problem = _key(key)
        yield Row(name, group, group + 1, image, size or 0, caption, problem=problem)


def _plain(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()) if pa.types.is_binary_view(column.type) else column


def raw_text(column: pa.Array) -> list[bytes | None]:
    """Return text as the stored bytes: Parquet readers do not check that a string is UTF-8."""
    column = _plain(column)
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values


def _key(raw: bytes | None) -> tuple[str, tuple[str, str] | None]:
    if not raw:
        return "", ("missing_key", "")
    try:
        return raw.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return raw.decode("utf-8", "replace"), ("unsafe_path", f"the key is not UTF-8: {error}")


def index_parquet(uri: str, *, slice_rows: int, require_caption: bool) -> ShardIndex:
    """Count the samples of each row group and join small neighbours into slices of at most `slice_rows`.

    Reads the image column too: the sizes of its values are written nowhere else.
    """
    rejects: list[Reject] = []
    slices: list[Slice] = []
    first_row = 0
    with open_parquet(uri, require_caption=require_caption) as shard:
        groups = [_Group(group) for group in range(shard.num_row_groups)]
        rows = parquet_rows(shard, range(shard.num_row_groups), load=False)
        for row, verdict in sort_rows(rows, shard=files.redact(uri), require_caption=require_caption):
            groups[row.start].count(verdict)
            if isinstance(verdict, Reject):
                rejects.append(verdict)
    for run in _runs(groups, slice_rows):
        num_rows = sum(group.samples for group in run)
        skip = _skips(run)
        slices.append(Slice(uri, run[0].index, len(run), first_row, num_rows, skip))
        first_row += num_rows
    return ShardIndex(uri, first_row, tuple(slices), tuple(rejects), files.size_bytes(uri))


@dataclass(slots=True)
class _Group:
    index: int
    rows: int = 0
    samples: int = 0
    duplicates: tuple[int, ...] = ()

    def count(self, verdict: str | Reject) -> None:
        if isinstance(verdict, str):
            self.samples += 1
        elif verdict.reason == "duplicate_key":
            self.duplicates += (self.rows,)
        self.rows += 1


def _runs(groups: list[_Group], slice_rows: int) -> Iterator[list[_Group]]:
    run: list[_Group] = []
    for group in groups:
        if run and sum(one.samples for one in run) + group.samples > slice_rows:
            yield run
            run = []
        if run or group.samples:
            run.append(group)
    if run:
        yield run


def _skips(run: list[_Group]) -> tuple[int, ...]:
    before, skips = 0, list[int]()
    for group in run:
        skips += [before + position for position in group.duplicates]
        before += group.rows
    return tuple(skips)
