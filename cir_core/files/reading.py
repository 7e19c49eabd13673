"""Read files. A remote one is read in ranges, each tried again by itself, the next one fetched ahead."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cir_core.files.access import StorageError, attempt, clear_errors, filesystem
from cir_core.files.uris import is_local, is_web, local_path, redact
from cir_core.files.web import WebFile, WebStream
from cir_core.schema import CirError, UnreadableError

RANGE_BYTES = 8 << 20
"""Bytes of one request of a sequential read; two of them are in memory."""
_PARQUET_FAULTS = ("thrift", "orrupt", "Unexpected end", "magic", "Parquet")  # pyarrow raises OSError for these


class RemoteFile(io.RawIOBase):
    """A file of an object store or a web server, for random access. Every range is tried again by itself; a short answer is no end.

    Raises CirError if the file is written again while it is read: its ranges would not fit together.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._filesystem, self._path = filesystem(uri)
        self._file: pa.NativeFile | WebFile | None = None
        self._version: object = None
        self._position = 0
        self.size = int(attempt(uri, lambda: self._opened().size()))

    def _opened(self) -> pa.NativeFile | WebFile:
        if self._file is None:
            file = WebFile(self.uri) if is_web(self.uri) else self._filesystem.open_input_file(self._path)
            version = (file.size(), _etag(file))
            if self._version not in (None, version):
                raise CirError(f"{redact(self.uri)} was written again while it was being read; start again")
            self._file, self._version = file, version
        return self._file

    def read_at(self, offset: int, length: int) -> bytes:
        """Return the bytes [offset, offset + length), fewer only where the file ends."""
        length = max(0, min(length, self.size - offset))

        def once() -> bytes:
            try:
                data = cast(bytes, self._opened().read_at(length, offset))
            except BaseException:
                self._file = None
                raise
            if len(data) < length:
                self._file = None
                raise StorageError(f"{redact(self.uri)}: {len(data)} of {length} bytes at {offset} came")
            return data

        return attempt(self.uri, once) if length else b""

    def check_unchanged(self) -> None:
        """Raise CirError if the file is not the one that was opened."""
        self._file = None
        attempt(self.uri, self._opened)

    def readable(self) -> bool:
        """Reading is all it does."""
        return True

    def seekable(self) -> bool:
        """Any range can be read."""
        return True

    def tell(self) -> int:
        """Return the position of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; costs nothing."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` bytes, all that are left for -1, fewer only at the end."""
        data = self.read_at(self._position, self.size if size < 0 else size)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the position on."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _etag(file: pa.NativeFile | WebFile) -> object:
    try:
        return (file.metadata() or {}).get("ETag")
    except (OSError, ValueError, NotImplementedError):  # not every file system tells
        return None


class _ReadAhead(io.RawIOBase):
    """Reads a RemoteFile forwards, with the next range on its way."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._context = copy_context()  # with the patience of who opened it
        self._chunk, self._used, self._asked = b"", 0, 0
        self._next: Future[bytes] | None = None
        self._ask()

    def _ask(self) -> None:
        """Ask for the next range; after the last one of several, check that all were of one file."""
        if self._asked < self._file.size:
            self._next = self._pool.submit(self._context.run, self._file.read_at, self._asked, RANGE_BYTES)
            self._asked += RANGE_BYTES
        else:
            self._next = None
            if self._file.size > RANGE_BYTES:
                self._file.check_unchanged()

    def readable(self) -> bool:
        """Reading is all it does."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill as much of `buffer` as the range at hand holds."""
        if self._used == len(self._chunk):
            if self._next is None:
                return 0
            self._chunk, self._used = self._next.result(), 0
            self._ask()
        data = self._chunk[self._used : self._used + len(buffer)]
        buffer[: len(data)] = data
        self._used += len(data)
        return len(data)

    def close(self) -> None:
        """Wait for the request under way, if any, and end the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        super().close()


@contextmanager
def open_stream(uri: str) -> Iterator[BinaryIO]:
    """Open for sequential reading, without decompression. Local files can seek as well."""
    if is_local(uri):
        with clear_errors(uri), local_path(uri).open("rb") as stream:
            yield stream
    elif is_web(uri):  # one request: many web servers know no ranges
        with WebStream(uri) as web:
            yield cast(BinaryIO, io.BufferedReader(web, 1 << 20))
    else:
        with _ReadAhead(RemoteFile(uri)) as raw:
            yield cast(BinaryIO, io.BufferedReader(raw, 1 << 20))


@contextmanager
def open_random(uri: str) -> Iterator[pa.NativeFile]:
    """Open for random access, as `pyarrow.parquet.ParquetFile` needs it."""
    if is_local(uri):
        opened, path = filesystem(uri)
        with attempt(uri, lambda: opened.open_input_file(path)) as file, clear_errors(uri):
            yield file
    else:
        with pa.PythonFile(RemoteFile(uri), mode="r") as file:
            yield file


@contextmanager
def open_parquet(uri: str, what: str = "file", *, buffer_bytes: int = 0) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; damage, seen now or while reading, is a CirError "unreadable <what> <uri>".

    buffer_bytes: columns are read in pieces of this size, so that memory does not grow with the row groups; 0 reads a
        column of a row group in one request.
    """
    with open_random(uri) as raw:
        try:
            yield pq.ParquetFile(
                raw, pre_buffer=False, buffer_size=buffer_bytes
            )  # pre-buffered ranges stay in memory to the end
        except (pa.ArrowInvalid, OSError) as error:
            lasting = isinstance(error, OSError) and not any(mark in str(error) for mark in _PARQUET_FAULTS)
            if isinstance(error, StorageError) or lasting:
                raise
            raise UnreadableError(f"unreadable {what} {redact(uri)}: not a sound Parquet file ({error})") from None


def read_bytes(uri: str, limit: int | None = None) -> bytes:
    """Return a whole file, or its first `limit` bytes."""
    if is_local(uri) or is_web(uri):
        with open_stream(uri) as stream:
            return stream.read(-1 if limit is None else limit)
    with RemoteFile(uri) as file:
        return file.read(-1 if limit is None else limit)


def read_range(uri: str, offset: int, length: int) -> bytes:
    """Return the bytes [offset, offset + length) in one ranged read; fewer where the file ends earlier."""
    if is_local(uri):
        with open_random(uri) as file:
            return cast(bytes, file.read_at(length, offset))
    with RemoteFile(uri) as file:
        return file.read_at(offset, length)


def read_json(uri: str) -> Any:
    """Return the parsed JSON of a file; CirError if it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CirError(f"{redact(uri)}: not a JSON file ({error})") from None
