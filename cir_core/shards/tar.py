"""Rows of a WebDataset tar, read forwards once, with every fault of the file told apart.

Python's tarfile parses each header; the walk over the file is ours, because tarfile takes a truncated or
damaged archive for a complete one. As in WebDataset, a member's name is split at the first dot of its last
path component into key and suffix, and neighbours with the same key are one sample. Folders are no rows, and
neither are the `._name` twins that macOS's tar puts before every member: they hold attributes, and split no sample.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from cir_core import files
from cir_core.schema import UnreadableError
from cir_core.shards.model import IMAGE_SUFFIXES, MAX_SAMPLE_BYTES, MAX_SLICE_BYTES, Row, Slice

_BLOCK = 512
_MAX_NAME_HEADER = 1 << 20
_READ_ON = 1 << 20
_MAX_PADDING = 1 << 20  # zeros after the end of an archive: the largest record that tar writes by its options
_NAME_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_HEADERS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


class _DamageError(Exception):
    """The walk cannot go on: (reason, detail)."""


class TarStream:
    """Sequential reading with a position; `size` is given where the stream can seek, to skip for free.

    start: where in `raw` position 0 lies.
    """

    def __init__(self, raw: BinaryIO, size: int | None, start: int = 0) -> None:
        self._raw, self._size, self._start, self.position = raw, size, start, 0
        if start:
            raw.seek(start)

    def read(self, count: int) -> bytes:
        """Return `count` bytes, fewer only at the end of the file."""
        data = self._raw.read(count)
        while len(data) < count and (more := self._raw.read(count - len(data))):
            data += more
        self.position += len(data)
        return data

    def at_end(self) -> bool:
        """Whether a stream of known size is used up."""
        return self.position == self._size

    def take(self, count: int) -> bytes:
        """Return exactly `count` bytes or raise."""
        data = self.read(count)
        if len(data) < count:
            raise _DamageError("truncated_tar", f"the file ends at byte {self.position}")
        return data

    def skip(self, count: int) -> None:
        """Move on by exactly `count` bytes or raise."""
        if self._size is not None:
            if self.position + count > self._size:
                raise _DamageError("truncated_tar", f"the file ends at byte {self._size}")
            self.position += count
            self._raw.seek(self._start + self.position)
            return
        while count:
            count -= len(self.take(min(count, _READ_ON)))


@contextmanager
def open_tar(uri: str) -> Iterator[TarStream]:
    """Open a whole tar."""
    with files.open_stream(uri) as raw:
        yield TarStream(raw, files.size_bytes(uri) if files.is_local(uri) else None)


def slice_rows(part: Slice) -> Iterator[Row]:
    """Yield the rows of one slice, read in one piece; where a huge member lies between them, row by row."""
    if part.length > MAX_SLICE_BYTES:
        with files.open_random(part.shard) as raw:
            stream = TarStream(cast(BinaryIO, raw), part.length, part.offset)
            yield from tar_rows(stream, load=True, cut_out=True, name=files.redact(part.shard))
        return
    data = files.read_range(part.shard, part.offset, part.length)
    stream = TarStream(io.BytesIO(data), len(data))
    yield from tar_rows(stream, load=True, cut_out=True, name=files.redact(part.shard))


@dataclass(frozen=True, slots=True)
class _Member:
    name: str  # may hold surrogates where the bytes are not UTF-8
    start: int  # of its first header
    size: int
    is_file: bool
    is_folder: bool


def _next_member(stream: TarStream) -> _Member | None:
    """Read headers up to a member's data; None at the end-of-archive marker."""
    start, extra = stream.position, dict[str, str]()
    while True:
        header_at = stream.position
        header = stream.take(_BLOCK)
        if not header.strip(b"\0"):
            return None
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _DamageError("corrupt_tar", f"bad header at byte {header_at}: {error}") from None
        if info.size < 0:
            raise _DamageError("corrupt_tar", f"bad header at byte {header_at}: negative size")
        if info.type not in (*_NAME_HEADERS, *_PAX_HEADERS, tarfile.XGLTYPE):
            break
        extra |= _name_header(info, stream)
    if info.type == tarfile.GNUTYPE_SPARSE and header[482]:
        while stream.take(_BLOCK)[504]:
            pass
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    size = int(extra.get("size", info.size)) if has_data else 0
    plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and "sparse" not in extra
    return _Member(extra.get("path", info.name), start, size, plain, info.isdir())


def _name_header(info: tarfile.TarInfo, stream: TarStream) -> dict[str, str]:
    """Parse an extension header: a long name, or the path and size records of the pax format."""
    if info.size > _MAX_NAME_HEADER:
        raise _DamageError("corrupt_tar", f"an extension header of {info.size} bytes before byte {stream.position}")
    data = stream.take(info.size)
    stream.skip(-info.size % _BLOCK)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    return _pax_records(data, stream.position) if info.type in _PAX_HEADERS else {}


def _pax_records(data: bytes, position: int) -> dict[str, str]:
    found: dict[str, str] = {}
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        if not (space and length.isdigit() and len(length) < 8 and len(length) + 2 < int(length) <= len(data)):
            raise _DamageError("corrupt_tar", f"a damaged pax header before byte {position}")
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        data = data[int(length) :]
        if name == b"path" or (name == b"size" and value.isdigit() and len(value) < 20):
            found[name.decode()] = value.decode("utf-8", "surrogateescape")
        elif name.startswith(b"GNU.sparse"):
            found["sparse"] = "1"
    return found


def _split_name(name: str) -> tuple[str, str, bool]:
    """Return key, lower-case suffix, and whether the name is safe."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    folder, slash, base = name.rpartition("/")
    dot = base.find(".")
    key, suffix = (f"{folder}{slash}{base[:dot]}", base[dot + 1 :].lower()) if dot > 0 else (name, "")
    climbs = name.startswith("/") or ".." in name.split("/") or "\0" in name or not name
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        climbs = True
    return key, suffix, not climbs


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\0", "\ufffd")


@dataclass
class _Group:
    """The members of one sample so far."""

    key: str
    start: int
    end: int = 0
    image: bytes | None = None
    image_size: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)
    suffixes: dict[str, None] = field(default_factory=dict)  # in order; a film's frames may be 100,000 of them
    problem: tuple[str, str] | None = None

    def add(self, member: _Member, suffix: str, stream: TarStream, *, load: bool) -> None:
        """Read or skip the member's data, padding included."""
        self.suffixes[suffix] = None
        is_image = suffix in IMAGE_SUFFIXES
        wanted = (is_image and self.image is None) or suffix in ("txt", "json")
        data = b""
        if wanted and member.is_file and member.size <= MAX_SAMPLE_BYTES and (load or not is_image):
            data = stream.take(member.size)
            stream.skip(-member.size % _BLOCK)
        else:
            stream.skip(member.size + -member.size % _BLOCK)
        self.end = stream.position
        if wanted and not member.is_file:
            self.problem = self.problem or ("not_a_file", _printable(member.name))
        elif wanted and is_image:
            self.image, self.image_size = data, member.size
        elif wanted and member.size > MAX_SAMPLE_BYTES:
            self.problem = self.problem or ("sample_too_large", f"{suffix}: {member.size} bytes")
        elif wanted:
            self.texts[suffix] = data

    def row(self) -> Row:
        """Close the group."""
        names = tuple(suffix or "a file without suffix" for suffix in self.suffixes)
        text, parsed = self.texts.get("txt"), self.texts.get("json")
        return Row(
            _printable(self.key),
            self.start,
            self.end,
            self.image,
            self.image_size,
            text,
            parsed,
            self.problem,
            names,
        )


def tar_rows(stream: TarStream, *, load: bool, cut_out: bool = False, name: str = "") -> Iterator[Row]:
    """Yield the rows of a tar in order; a fault that ends the walk is the `problem` of the last row.

    load: read the images; without it Row.image is b"" and only image_size is set.
    cut_out: the stream is a slice, which ends without a marker.
    Raises CirError (naming `name`) if there is not one valid header.
    """
    group: _Group | None = None
    try:
        while not (cut_out and stream.at_end()) and (member := _next_member(stream)) is not None:
            if member.is_folder or member.name.rpartition("/")[2].startswith("._"):
                stream.skip(member.size + -member.size % _BLOCK)
                continue
            key, suffix, safe = _split_name(member.name)
            if group is not None and (group.key != key or suffix in group.suffixes):
                yield group.row()
                group = None
            if group is None:
                problem = None if safe else ("unsafe_path", _printable(member.name))
                group = _Group(key, member.start, problem=problem)
            group.add(member, suffix, stream, load=load)
        if group is not None:
            yield group.row()
            group = None
        if not cut_out and (found_at := _trailing_data(stream)):
            raise _DamageError("trailing_data", found_at)
    except _DamageError as damage:
        reason, detail = damage.args
        if group is None and stream.position <= _BLOCK:
            raise UnreadableError(f"unreadable shard {name}: not a tar file ({detail}); decompress a .tar.gz") from None
        key, start = (_printable(group.key), group.start) if group is not None else ("", stream.position)
        yield Row(key, start, stream.position, problem=(reason, detail))


def _trailing_data(stream: TarStream) -> str:
    """Say what follows the end of the archive besides padding; "" if nothing does."""
    start = stream.position
    while block := stream.read(_READ_ON):
        if block.strip(b"\0"):
            found_at = stream.position - len(block.lstrip(b"\0"))
            return f"the archive ends before byte {found_at}; the rest is not read"
    if stream.position - start > _MAX_PADDING:
        return f"zeros from byte {start} to the end at {stream.position}: a part that was never written?"
    return ""
