"""What a shard is made of: samples, rejects with their reasons, slices, and the index that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from cir_core import files
from cir_core.schema import CirError, Reject

_T = TypeVar("_T")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_SAMPLE_BYTES = 64 << 20
"""Largest image, and largest caption file, that is read; a larger one is rejected, which bounds memory."""
MAX_SLICE_BYTES = 256 << 20
"""A slice is read whole, so it is cut short at this size even if it has fewer than slice_rows samples."""
_MEMBERS_SHOWN = 8

REJECT_REASONS = {
    "truncated_tar": "the file ends without the end-of-archive marker; the sample at its end is not complete",
    "corrupt_tar": "a header inside the tar is damaged; what follows it cannot be read",
    "trailing_data": "there is data after the end of the archive, such as a second tar, or more zeros than any padding",
    "missing_image": "the sample has no image",
    "missing_caption": "the sample has no caption, and captions are required",
    "missing_key": "the row has no key",
    "empty_image": "the image has zero bytes",
    "duplicate_key": "an earlier sample of the shard has the same key",
    "missing_uri": "the row of a list has no URI",
    "unsafe_uri": "the URI names a place that its list may not send anyone to, or is not UTF-8",
    "bad_row": "the row of a CSV has more or fewer cells than its header",
    "missing": "the picture is not there (any more), or access is refused",
    "bad_caption_encoding": "the caption is not UTF-8",
    "bad_json": "the .json is not a JSON object, or its caption is not a string",
    "unsafe_path": "the name is absolute, climbs with '..', or is not UTF-8",
    "not_a_file": "a member is a link, a device or a sparse file; in a folder, a link that leads nowhere or a pipe",
    "sample_too_large": f"the image or caption file is larger than {MAX_SAMPLE_BYTES >> 20} MiB",
    "decoder_crash": "the process that decodes the image dies of it, again and again, with nothing else to decode",
    "unreadable_shard": "the whole shard is none, and the job was told to go on",
    "duplicate_id": "an earlier part of the embedding store has the same id",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its caption. row: position among the valid samples of its shard, from 0."""

    shard: str
    key: str
    row: int
    image: bytes
    caption: str


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of `num_rows` consecutive samples that can be read alone, from row `first_row` of the shard on.

    offset, length: the byte range of a tar; the first row group and the number of row groups of a Parquet
    file; the position in the listing and the number of files of an image folder; the bytes of a CSV list, the
    first row and the number of rows of a Parquet list.
    skip: positions, among the rows of this range, of duplicates, which cannot be told from the range alone.
    files: for an image folder, the paths in it. links: the rows name images that lie elsewhere (see `uri_list`).
    """

    shard: str
    offset: int
    length: int
    first_row: int
    num_rows: int
    skip: tuple[int, ...] = ()
    files: tuple[str, ...] = ()
    links: bool = False


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The counted structure of a shard; its slices cover the rows 0 to num_samples - 1 in order."""

    shard: str
    num_samples: int
    slices: tuple[Slice, ...]
    rejects: tuple[Reject, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row as stored, before judgement. start, end: its place in the shard, in the units of Slice.offset.

    image: the bytes, or None if there is none; b"" also stands for bytes that were skipped, see `image_size`.
    caption: raw bytes of the text or None; json_text: raw bytes of a .json file, used where caption is None.
    problem: a structural fault found while reading, as (reason, detail).
    """

    key: str
    start: int
    end: int
    image: bytes | None = None
    image_size: int = 0
    caption: bytes | None = None
    json_text: bytes | None = None
    problem: tuple[str, str] | None = None
    members: tuple[str, ...] = ()


class UnusableError(Exception):
    """Raised inside `judge`; becomes a Reject."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def judge(row: Row, *, require_caption: bool) -> str:
    """Return the caption of a usable row; raise UnusableError otherwise. Needs image_size, not the image."""
    if row.problem is not None:
        raise UnusableError(*row.problem)
    if row.image is None:
        more = ", ..." if len(row.members) > _MEMBERS_SHOWN else ""
        held = f"it holds {', '.join(row.members[:_MEMBERS_SHOWN])}{more}" if row.members else ""
        raise UnusableError("missing_image", held)
    if row.image_size == 0:
        raise UnusableError("empty_image")
    if row.image_size > MAX_SAMPLE_BYTES:
        raise UnusableError("sample_too_large", f"{row.image_size} bytes")
    caption = _text_of(row)
    if caption is None and require_caption:
        raise UnusableError("missing_caption")
    return caption or ""


def _text_of(row: Row) -> str | None:
    if row.caption is not None:
        try:
            return row.caption.decode("utf-8-sig")  # a byte order mark is no part of the text
        except UnicodeDecodeError as error:
            raise UnusableError("bad_caption_encoding", str(error)) from None
    if row.json_text is None:
        return None
    try:
        parsed = json.loads(row.json_text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UnusableError("bad_caption_encoding", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise UnusableError("bad_json", str(error)[:200]) from None
    if not isinstance(parsed, dict):
        raise UnusableError("bad_json", f"expected an object, found {type(parsed).__name__}")
    caption = parsed.get("caption")
    if caption is not None and not isinstance(caption, str):
        raise UnusableError("bad_json", f"caption is {type(caption).__name__}, expected a string")
    try:
        (caption or "").encode("utf-8")  # JSON can spell a lone surrogate, which no file can hold
    except UnicodeEncodeError as error:
        raise UnusableError("bad_caption_encoding", str(error)) from None
    return caption


@dataclass
class SliceBuilder:
    """Cuts a stream of usable and rejected rows into slices."""

    shard: str
    slice_rows: int
    slices: list[Slice] = field(default_factory=list)
    num_samples: int = 0
    _start: int = -1
    _end: int = -1
    _rows: int = 0
    _position: int = 0
    _skip: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.slice_rows < 1:
            raise CirError(f"slice_rows must be at least 1, not {self.slice_rows}")

    def add(self, start: int, end: int) -> None:
        """Append a usable row that lies at [start, end)."""
        if self._rows and (self._rows >= self.slice_rows or end - self._start > MAX_SLICE_BYTES):
            self.close()
        if not self._rows:
            self._start, self._position, self._skip = start, 0, []
        self._rows += 1
        self._position += 1
        self._end = end

    def pass_over(self, *, duplicate: bool) -> None:
        """Note a rejected row; a duplicate must be remembered, anything else shows itself again when read."""
        if self._rows:
            if duplicate:
                self._skip.append(self._position)
            self._position += 1

    def close(self) -> None:
        """End the slice under way."""
        if self._rows:
            first = self.num_samples
            length = self._end - self._start
            self.slices.append(Slice(self.shard, self._start, length, first, self._rows, tuple(self._skip)))
            self.num_samples += self._rows
            self._rows = 0


def check_count(part: Slice, samples: Iterator[_T]) -> Iterator[_T]:
    """Pass samples on; raise CirError if they are not as many as the slice promises."""
    count = 0
    for sample in samples:
        count += 1
        if count > part.num_rows:
            break
        yield sample
    if count != part.num_rows:
        raise CirError(
            f"{files.redact(part.shard)}: the slice at {part.offset} no longer holds {part.num_rows} "
            "samples; the shard was changed since it was indexed, or require_caption differs: index it again"
        )


def sort_rows(rows: Iterator[Row], *, shard: str, require_caption: bool) -> Iterator[tuple[Row, str | Reject]]:
    """Yield every row of a shard with its caption, or with the Reject it becomes."""
    kept: set[str] = set()
    for row in rows:
        try:
            if row.problem is None and row.key in kept:
                raise UnusableError("duplicate_key")
            caption = judge(row, require_caption=require_caption)
        except UnusableError as fault:
            yield row, Reject(shard, row.key, fault.reason, fault.detail)
        else:
            kept.add(row.key)
            yield row, caption


def read_rows(rows: Iterator[Row], *, shard: str, require_caption: bool) -> Iterator[Sample | Reject]:
    """Turn the rows of a whole shard into samples and rejects, in stored order."""
    position = 0
    for row, verdict in sort_rows(rows, shard=shard, require_caption=require_caption):
        if isinstance(verdict, Reject):
            yield verdict
        else:
            yield Sample(shard, row.key, position, row.image or b"", verdict)
            position += 1


def read_part(rows: Iterator[Row], part: Slice, *, shard: str, require_caption: bool) -> Iterator[Sample]:
    """Turn the rows of one slice into its samples; `part.skip` stands in for the keys seen before it."""
    position, skip = part.first_row, frozenset(part.skip)
    for index, row in enumerate(rows):
        if index in skip:
            continue
        try:
            caption = judge(row, require_caption=require_caption)
        except UnusableError:
            continue
        yield Sample(shard, row.key, position, row.image or b"", caption)
        position += 1
