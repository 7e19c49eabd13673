"""How a URI is reached: its file system, errors in our words, and another try where one may help."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, TypeVar, cast
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import tenacity

from cir_core.files.uris import is_local, is_web, join, local_path, redact, scrub, split
from cir_core.schema import AccessError, CirError, RefusedError, SchemeError

ARROW_SCHEMES = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"})
_GONE = (404, 410)
_MISSING = ("NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "Bucket does not exist", "not found")
# Without a body, as answers to HEAD have none, pyarrow knows these only as ACCESS_DENIED or as a 400.
_CREDENTIALS = re.compile(
    r"AWS Error (INVALID_ACCESS_KEY|(SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE|INVALID_CLIENT_TOKEN_ID|REQUEST_EXPIRED)\b)"
    r"|ExceptionName: (ExpiredToken|InvalidToken|TokenRefreshRequired)"
)
_REFUSED = "ACCESS_DENIED"
# Answers that the same request will get again; 408, 409 (a conflict with another request) and 429 ask for another try.
_FINAL = re.compile(r"HTTP status (?!408|409|429)(3\d\d|4\d\d)|INVALID_PARAMETER|INVALID_URI|METHOD_NOT_ALLOWED")
_CLIENTS = ("botocore", "http", "httpx", "httpx2", "urllib3")  # libraries under fsspec whose errors are no OSError
_logger = logging.getLogger("cir_core.files")
_patience: ContextVar[float] = ContextVar("patience", default=180.0)
_watchers: list[Callable[[], object]] = []
_T = TypeVar("_T")


class StorageError(OSError):
    """A failure that another try may mend: the network's, or a store's that is busy or away."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a listing. name: its path below the listed folder, literally. modified_ns: 0 where the store is silent."""

    folder: str
    name: str
    size_bytes: int
    modified_ns: int

    @property
    def uri(self) -> str:
        """Where it opens; not kept, because there may be ten million of a folder."""
        return join(self.folder, self.name)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Set for how long a failing store is tried again inside the block, in this thread; 180 s otherwise.

    Short while a user waits for a first check of what was typed; long once there is work that an outage would waste.
    """
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


def attempt(uri: str, action: Callable[[], _T]) -> _T:
    """Do something at `uri`, again and again while it fails as it may pass; local failures are final.

    Raises:
        CirError: it is not there, or not for us; asking again would not help.
        StorageError: it still failed when the patience ended.
    """

    def once() -> _T:
        with clear_errors(uri):
            return action()

    if is_local(uri):
        return once()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(StorageError),
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=10),
        stop=tenacity.stop_after_delay(_patience.get()),
        before_sleep=_tell,
        reraise=True,
    )
    return retrying(once)


def on_retry(call: Callable[[], object]) -> None:
    """Call `call` whenever a request is about to be made again, in this process, from any of its threads."""
    _watchers.append(call)


def _tell(state: tenacity.RetryCallState) -> None:
    for call in _watchers:
        call()
    number = state.attempt_number
    if number >= 4 and number.bit_count() == 1 and state.outcome is not None:  # the 4th, 8th, 16th failure in a row
        _logger.warning("%s; attempt %d failed, trying again", state.outcome.exception(), number)


@contextmanager
def clear_errors(uri: str) -> Iterator[None]:
    """Turn what a user can mend into CirError naming the URI, the rest into OSError; scrub the text of both."""
    name = redact(uri)
    try:
        yield
    except StorageError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise _not_there(name) from None
    except IsADirectoryError:
        raise CirError(f"{name}: is a folder, expected a file") from None
    except PermissionError as error:
        raise RefusedError(f"{name}: access refused ({scrub(str(error), uri)}); check the permissions") from None
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library == "aiohttp":
            raise _web_error(error, uri) from None
        if status := getattr(getattr(error, "response", None), "status_code", None):  # of hf:// and its like
            raise _answered(name, status) from None
        if isinstance(error, OSError):
            raise _worded(error, uri) from None
        if library not in _CLIENTS:
            raise
        raise StorageError(f"{name}: {type(error).__name__} {scrub(str(error), uri)}") from None


def _worded(error: OSError, uri: str) -> Exception:
    name, text = redact(uri), scrub(str(error), uri)
    if _CREDENTIALS.search(text):
        return AccessError(f"{name}: access refused ({text}); check the credentials")
    if _REFUSED in text:
        return RefusedError(f"{name}: access refused ({text}); check the credentials")
    if any(mark in text for mark in _MISSING):
        return CirError(f"{name}: no such file, folder or bucket ({text})")
    if is_local(uri):
        return OSError(error.errno, f"{name}: {text}")
    if _FINAL.search(text):
        return RefusedError(f"{name}: the store refuses the request ({text}); check endpoint, region and name")
    return StorageError(error.errno, f"{name}: {text}")


def _not_there(name: str) -> CirError:
    return CirError(f"{name}: no such file, folder or bucket; check the path")


def _answered(name: str, status: int) -> Exception:
    if status in _GONE:
        return _not_there(name)
    if status in (401, 403):
        return RefusedError(f"{name}: access refused (HTTP {status}); check the permissions")
    if status >= 500 or status in (408, 425, 429):  # these say nothing about the file
        return StorageError(f"{name}: the server answers {status}")
    return RefusedError(f"{name}: the server refuses the request (HTTP {status})")


def _web_error(error: Exception, uri: str) -> Exception:
    import aiohttp  # here: only web addresses need it

    name = redact(uri)
    if isinstance(error, aiohttp.ClientResponseError):
        return _answered(name, error.status)
    if isinstance(error, (aiohttp.ClientConnectorCertificateError, aiohttp.InvalidURL)):
        return CirError(f"{name}: not an address to fetch from ({type(error).__name__})")
    if isinstance(error, aiohttp.ClientConnectorError):
        if isinstance(error.os_error, socket.gaierror) and error.os_error.errno == socket.EAI_NONAME:
            return CirError(f"{name}: no such host")
        return StorageError(f"{name}: no connection ({error.os_error})")
    return StorageError(f"{name}: the transfer broke off ({type(error).__name__})")


def info_of(opened: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    """Return fsspec's record of a file; of a web server any failure, which fsspec would call "not found"."""
    try:
        return cast(dict[str, Any], opened.info(path))
    except FileNotFoundError as error:
        cause = error.__cause__
        if "https" in opened.protocol and cause is not None and getattr(cause, "status", None) not in _GONE:
            raise cause from None
        raise


class _Handler(pafs.FSSpecHandler):  # type: ignore[misc]
    """Lets failures through: pyarrow's own asks fsspec's `isfile`, which takes a store that is away for "no"."""

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        """Return what is at each path."""
        return [self._file_info(path) for path in paths]

    def _file_info(self, path: str) -> pafs.FileInfo:
        try:
            info = info_of(self.fs, path)
        except FileNotFoundError:
            return pafs.FileInfo(path, pafs.FileType.NotFound)
        return self._create_file_info(path, info)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Open for reading."""
        if info_of(self.fs, path)["type"] == "directory":
            raise IsADirectoryError(path)
        return pa.PythonFile(self.fs.open(path, mode="rb"), mode="r")

    open_input_stream = open_input_file


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system that holds `uri` and the path of `uri` in it.

    Clients of object stores are kept and shared inside a process. Raises CirError for a scheme nothing opens.
    """
    parts = split(uri)
    if parts.scheme in ("", "file"):
        return pafs.LocalFileSystem(), str(local_path(uri))
    with clear_errors(uri):
        try:
            if parts.scheme in ARROW_SCHEMES:
                root_uri = f"{parts.scheme}://{_quoted_netloc(parts.netloc)}/{parts.query}"
                opened, root = _arrow_filesystem(root_uri, _store_settings())
                return opened, f"{root.rstrip('/')}/{parts.path}".rstrip("/") if parts.path else root
            web = is_web(uri)
            opened, path = fsspec.core.url_to_fs(uri, **(_web_options() if web else {}))
            if web:
                opened.encode_url(path)  # a bad address is told here, not by the first request
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError, ValueError) as error:
            detail = scrub(str(error), uri)
            schemes = ARROW_SCHEMES.union(fsspec.available_protocols())
            kind = SchemeError if isinstance(error, ImportError) or parts.scheme not in schemes else CirError
            raise kind(
                f"{redact(uri)}: cannot open this kind of URI ({detail}); use a local path, s3://, gs://, "
                "abfs:// or a scheme that an installed fsspec package provides"
            ) from None
    return pafs.PyFileSystem(_Handler(opened)), path


def _web_options() -> dict[str, Any]:
    import aiohttp

    # A shard may take longer than the 5 minutes which aiohttp gives a whole transfer; silence may not.
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


def _quoted_netloc(netloc: str) -> str:
    userinfo, at, host = netloc.rpartition("@")
    return quote(userinfo, safe=":%") + at + host


def _store_settings() -> frozenset[tuple[str, str]]:
    """Return what the environment says of object stores: a client is made from it, and kept only as long as it stands."""
    return frozenset(
        (name, value) for name, value in os.environ.items() if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))
    )


@lru_cache(maxsize=64)
def _arrow_filesystem(root_uri: str, settings: frozenset[tuple[str, str]]) -> tuple[pafs.FileSystem, str]:  # noqa: ARG001
    return cast(tuple[pafs.FileSystem, str], pafs.FileSystem.from_uri(root_uri))


def _info(uri: str) -> pafs.FileInfo:
    opened, path = filesystem(uri)
    return attempt(uri, lambda: opened.get_file_info(path))


def exists(uri: str) -> bool:
    """Whether a file or folder is there. A refused access or a failing network raises."""
    return bool(_info(uri).type != pafs.FileType.NotFound)


def is_folder(uri: str) -> bool:
    """Whether `uri` is a folder (for an object store: whether any key lies under it)."""
    return bool(_info(uri).type == pafs.FileType.Directory)


def size_bytes(uri: str) -> int:
    """Return the size of a file in bytes."""
    info = _info(uri)
    if info.type == pafs.FileType.NotFound:
        raise _not_there(redact(uri))
    if info.type == pafs.FileType.Directory or info.size is None:
        raise CirError(f"{redact(uri)}: is not a file with a known size")
    return int(info.size)


def list_files(uri: str, recursive: bool = True) -> list[StoredFile]:
    """Return the files of a folder with their sizes in bytes, sorted by name; each URI opens as it stands."""
    opened, path = filesystem(uri)

    def listed() -> list[pafs.FileInfo]:
        if opened.get_file_info(path).type == pafs.FileType.File:
            raise NotADirectoryError(path)
        return cast(list[pafs.FileInfo], opened.get_file_info(pafs.FileSelector(path, recursive=recursive)))

    base = path.strip("/") + "/"
    infos, found = attempt(uri, listed), list[StoredFile]()
    while infos:  # each is let go as it is taken over: of millions there is no room for both
        info = infos.pop()
        if info.type == pafs.FileType.File:
            found.append(StoredFile(uri, _below(base, info.path), int(info.size), int(info.mtime_ns or 0)))
    found.sort(key=attrgetter("name"))
    return found


def _below(base: str, path: str) -> str:
    path = path.lstrip("/")
    return path[len(base) :] if path.startswith(base) else path
