"""Pictures that lie in files of their own: where a list's row points, and the bytes that are there."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import BinaryIO, TypeVar, cast

import fsspec

from cir_core import files
from cir_core.files.access import StorageError, attempt
from cir_core.schema import CirError
from cir_core.shards.model import MAX_SAMPLE_BYTES, UnusableError
from cir_core.shards.refusals import judge_refusals

FETCH_THREADS = 16
"""Pictures fetched ahead: enough to hide a store's latency, few enough to hold in memory."""
_STORES = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "hf", "hdfs", "viewfs", "http", "https"})
_WEB = ("http", "https")
_ANSWERS_LATER = (408, 425, 429)  # and every 5xx: these say nothing about the picture
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def resolve(list_uri: str, given: str) -> str:
    """Return the URI that a row of a list means; a relative one counts from the list's folder.

    A list may come from a stranger, so a row names a file of this machine only if the list is one too, never
    another file system than those of the well-known stores and the list's own, never one wrapped in another
    ("::"), and from a remote list neither a folder above it (a relative row with "..") nor options of a store
    (`s3://...?endpoint_override=...` would send signed requests elsewhere). What a row of a web address
    names is fetched with this machine's rights to the network.

    Raises:
        UnusableError: "unsafe_uri".
    """
    own, scheme = _scheme(list_uri), _scheme(given)
    local = files.is_local(list_uri)
    if "\0" in given or "\n" in given or "\r" in given:
        raise UnusableError("unsafe_uri", "a control character in the URI")
    if "://" in given:
        if files.is_local(given):
            if not local:
                raise UnusableError("unsafe_uri", "a local path in a list that is not local")
        elif scheme not in _STORES and scheme != own:
            raise UnusableError("unsafe_uri", f"{scheme}:// is none of {', '.join(sorted(_STORES))}")
        elif not local and scheme not in _WEB and files.query_of(given) not in ("", files.query_of(list_uri)):
            raise UnusableError("unsafe_uri", "options of a store in a list that is not local")
        return given
    if local:
        return given if given.startswith("/") else files.join(_folder(list_uri), given)
    if given.startswith("/") or ".." in given.split("/"):
        raise UnusableError("unsafe_uri", "a local path, or one above the list's folder, in a list that is not local")
    return files.join(_folder(list_uri), given)


def _scheme(uri: str) -> str:
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator else ""


def _folder(uri: str) -> str:
    """Return the folder of a list; of file:///... its path, because the rest of a URI is quoted and a row is not."""
    if files.is_local(uri):
        path = str(files.local_path(uri)) if "://" in uri else uri
        folder, slash, _ = path.rpartition("/")
        return folder or "/" if slash else "."
    query = files.query_of(uri)
    return uri[: len(uri) - len(query)].rpartition("/")[0] + query


def fetch_image(uri: str) -> bytes:
    """Return the bytes of a picture or of its caption file, at most MAX_SAMPLE_BYTES + 1 of them: more is never read.

    Raises:
        AccessError: its store is closed to us (see `judge_refusals`); that says nothing about the picture either.
        SchemeError: nothing opens this kind of URI.
        CirError: it is not there, or access to it is refused.
        OSError: the store or host still did not answer when the patience ended (see `files.patience`); that says
            nothing about the picture.
    """
    if _scheme(uri) in _WEB:
        return attempt(uri, lambda: _fetch_web(uri))
    if files.is_local(uri) and (path := files.local_path(uri)).exists() and not (path.is_file() or path.is_dir()):
        raise CirError(f"{uri}: a pipe, a socket or a device, expected a file")  # a pipe would be waited for
    with judge_refusals(uri):
        return files.read_bytes(uri, MAX_SAMPLE_BYTES + 1)


def _fetch_web(uri: str) -> bytes:
    """One GET. Through `files` it would be a HEAD first, any failure of which reads "not there", "busy" too."""
    import aiohttp  # here: only lists of web addresses need it

    name = files.redact(uri)
    try:
        opened, address = fsspec.core.url_to_fs(uri)
        with opened.open(address, block_size=0, size=1) as stream:  # a size spares the HEAD; 0: as a stream
            return _read_up_to(cast(BinaryIO, stream), MAX_SAMPLE_BYTES + 1)
    except FileNotFoundError:
        raise CirError(f"{name}: no such file; check the address") from None
    except aiohttp.ClientResponseError as error:
        if error.status >= 500 or error.status in _ANSWERS_LATER:
            raise StorageError(f"{name}: the server answers {error.status}") from None
        raise CirError(f"{name}: the server refuses it ({error.status})") from None
    except (aiohttp.ClientConnectorCertificateError, aiohttp.InvalidURL) as error:
        raise CirError(f"{name}: not an address to fetch from ({type(error).__name__})") from None
    except aiohttp.ClientConnectorError as error:
        if isinstance(error.os_error, socket.gaierror) and error.os_error.errno == socket.EAI_NONAME:
            raise CirError(f"{name}: no such host") from None
        raise StorageError(f"{name}: no connection ({error.os_error})") from None
    except (aiohttp.ClientError, OSError) as error:
        raise StorageError(f"{name}: the transfer broke off ({type(error).__name__})") from None
    except ValueError as error:
        raise CirError(f"{name}: not an address ({type(error).__name__})") from None


def _read_up_to(stream: BinaryIO, limit: int) -> bytes:
    """Read on over short reads, which streams of the web give."""
    pieces, held = list[bytes](), 0
    while held < limit and (piece := stream.read(limit - held)):
        pieces.append(piece)
        held += len(piece)
    return b"".join(pieces)


def in_order(work: Callable[[_In], _Out], items: Iterable[_In], threads: int = FETCH_THREADS) -> Iterator[_Out]:
    """Yield work(item) of each item, in order, `threads` of them under way; items are taken only as needed."""
    waiting: deque[Future[_Out]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
    try:
        for item in items:
            waiting.append(pool.submit(copy_context().run, work, item))  # with the caller's `files.patience`
            if len(waiting) >= threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
