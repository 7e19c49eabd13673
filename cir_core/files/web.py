"""Files of web servers: transfers that go on where they broke, ranges where the server knows them."""

from __future__ import annotations

import io
import logging
import re
from functools import lru_cache
from typing import Any

from cir_core.files.access import StorageError, attempt, filesystem, info_of
from cir_core.files.uris import redact
from cir_core.schema import CirError

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_SKIP_BYTES = 1 << 20
_logger = logging.getLogger("cir_core.files")


class WebStream(io.RawIOBase):
    """Reads the bytes [start, stop) forwards. One GET; after a break, another one from there, or past what was read.

    size: of the whole file, known or None; a file of unknown size is not asked for in ranges.
    Raises CirError if the file is written again while it is read.
    """

    def __init__(
        self, uri: str, start: int = 0, stop: int | None = None, size: int | None = None, etag: str | None = None
    ) -> None:
        self._uri, self._name = uri, redact(uri)
        opened, self._address = filesystem(uri)
        self._web = opened.handler.fs
        self._position, self._stop, self._size, self._etag = start, stop, size, etag
        self._body: Any = None
        attempt(uri, self._open)

    def _open(self) -> None:
        if self._body is not None:
            return
        try:
            headers = {"Accept-Encoding": "identity"}
            if self._size is not None and (self._position or self._stop is not None):
                headers["Range"] = f"bytes={self._position}-{'' if self._stop is None else self._stop - 1}"
            # a size spares the HEAD, which some servers refuse; 0: as a stream
            self._body = self._web.open(self._address, block_size=0, size=1, headers=headers)
            self._to_position()
        except BaseException:
            self._drop()
            raise

    def _to_position(self) -> None:
        """Check what was answered; of a whole file, pass over what comes before the position."""
        answer = self._body.r
        length, etag, left = answer.headers.get("Content-Length"), answer.headers.get("ETag"), self._position
        if answer.status == 206:
            found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != self._position:
                raise CirError(f"{self._name}: the server answers another range than the one asked for")
            length, left = found[2], 0
        elif "Content-Encoding" in answer.headers:  # undone on the way: the length is another one
            length = None
        size = int(length) if length and length.isdecimal() else None
        for known, now in ((self._size, size), (self._etag, etag)):
            if None not in (known, now) and known != now:
                raise CirError(f"{self._name} was written again while it was being read; start again")
        self._size = size if self._size is None else self._size
        self._etag = etag if self._etag is None else self._etag
        if left:
            _tell_of_no_ranges(redact(self._uri).split("/")[2])
        while left:
            left -= len(self._some(min(left, _SKIP_BYTES), at=self._position - left))

    def _some(self, length: int, at: int) -> bytes:
        data = bytes(self._body.read(length))
        if not data and (at < self._position or at < (self._size or 0)):
            raise StorageError(f"{self._name}: the transfer broke off at byte {at}")
        return data

    def _next(self, length: int) -> bytes:
        self._open()
        try:
            return self._some(length, at=self._position)
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()

    def readable(self) -> bool:
        """Reading is all it does."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill as much of `buffer` as has come."""
        ends = [end for end in (self._stop, self._size) if end is not None]
        length = min([len(buffer), *(end - self._position for end in ends)])
        data = attempt(self._uri, lambda: self._next(length)) if length > 0 else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """End the transfer."""
        self._drop()
        super().close()


class WebFile:
    """What there is to know of a file, and its ranges; every failure is tried again by itself."""

    def __init__(self, uri: str) -> None:
        opened, address = filesystem(uri)
        self._uri = uri
        self._info = info_of(opened.handler.fs, address)
        if self._info["size"] is None:
            raise CirError(f"{redact(uri)}: the server tells no size, so parts of it cannot be read; copy it first")

    def size(self) -> int:
        """Return the size in bytes."""
        return int(self._info["size"])

    def metadata(self) -> dict[str, Any]:
        """Return what tells versions of the file apart, as far as the server says it."""
        return {"ETag": self._info.get("ETag")}

    def read_at(self, length: int, offset: int) -> bytes:
        """Return the bytes [offset, offset + length), which must lie in the file."""
        with WebStream(self._uri, offset, offset + length, self.size(), self._info.get("ETag")) as stream:
            return io.BufferedReader(stream).read(length)


@lru_cache(maxsize=256)
def _tell_of_no_ranges(host: str) -> None:
    _logger.warning("%s knows no ranges: every part of a file there is read from the file's beginning", host)
