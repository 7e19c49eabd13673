"""Pictures that lie in files of their own: where a list's row points, and the bytes that are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from cir_core import files
from cir_core.schema import CirError
from cir_core.shards.model import MAX_SAMPLE_BYTES, UnusableError
from cir_core.shards.refusals import judge_refusals

FETCH_THREADS = 16
"""Pictures fetched ahead: enough to hide a store's latency, few enough to hold in memory."""
_STORES = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "hf", "hdfs", "viewfs", "http", "https"})
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
        elif not local and not files.is_web(given) and files.query_of(given) not in ("", files.query_of(list_uri)):
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
    if files.is_local(uri) and (path := files.local_path(uri)).exists() and not (path.is_file() or path.is_dir()):
        raise CirError(f"{uri}: a pipe, a socket or a device, expected a file")  # a pipe would be waited for
    with judge_refusals(uri):
        return files.read_bytes(uri, MAX_SAMPLE_BYTES + 1)


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
