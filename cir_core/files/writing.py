"""Write files: whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from cir_core.files.access import attempt, clear_errors, exists, filesystem
from cir_core.files.reading import read_json
from cir_core.files.uris import is_local, local_path, split

_SINGLE_PUT_SCHEMES = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "az", "http", "https", "memory", "oss", "hf"})
_COPY_BYTES = 8 << 20


@contextmanager
def open_atomic(uri: str) -> Iterator[BinaryIO]:
    """Open for writing; the file appears, whole, only when the block ends without an exception.

    Local: a temporary name in the same folder, fsync, rename; missing folders are made. Object stores: the
    bytes are collected in a local temporary file and uploaded at the end; nothing appears if the block
    raises.
    """
    if is_local(uri):
        with clear_errors(uri), _local_atomic(local_path(uri)) as local:
            yield local
        return
    with tempfile.TemporaryFile() as buffer:
        yield cast(BinaryIO, buffer)
        _upload(uri, cast(BinaryIO, buffer))


@contextmanager
def _local_atomic(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """Write beside `path`, then rename; without `replace`, FileExistsError if it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def _upload(uri: str, source: BinaryIO) -> None:
    opened, path = filesystem(uri)
    single_put = split(uri).scheme in _SINGLE_PUT_SCHEMES
    target = path if single_put else f"{path}.{uuid.uuid4().hex}.tmp"

    def once() -> None:
        source.seek(0)
        if not single_put:
            opened.create_dir(path.rpartition("/")[0], recursive=True)
        with opened.open_output_stream(target, compression=None) as stream:
            shutil.copyfileobj(source, stream, _COPY_BYTES)
        if not single_put:
            opened.move(target, path)

    # In a thread: an interrupt of this one must not end the upload in the middle, which would publish the half.
    with ThreadPoolExecutor(1, thread_name_prefix="upload") as pool:
        pool.submit(copy_context().run, attempt, uri, once).result()


def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a file atomically (see `open_atomic`)."""
    if is_local(uri):
        with open_atomic(uri) as stream:
            stream.write(data)
    else:
        _upload(uri, io.BytesIO(data))


def _json_bytes(value: object) -> bytes:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def write_json(uri: str, value: object) -> None:
    """Write JSON atomically: sorted keys, indented, a newline at the end. NaN is refused: it is not JSON."""
    write_bytes(uri, _json_bytes(value))


def create_json(uri: str, value: object) -> Any:
    """Write JSON unless the file is there already; return what it then holds: of several writers, one wins.

    Local files and S3 (conditional PUT) decide that atomically; other stores are asked before.
    """
    data, parts = _json_bytes(value), split(uri)
    try:
        if is_local(uri):
            with _local_atomic(local_path(uri), replace=False) as stream:
                stream.write(data)
        elif parts.scheme == "s3" and not parts.query and "@" not in parts.netloc:
            attempt(uri, lambda: _conditional_put(uri, data))
        elif not exists(uri):
            write_bytes(uri, data)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP):  # what a file system without hard links says
            with clear_errors(uri):
                raise
        if not exists(uri):
            write_bytes(uri, data)
    return read_json(uri)  # also after our own write: an answer may have been lost and the write repeated


def _conditional_put(uri: str, data: bytes) -> None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    s3, path = fsspec.core.url_to_fs(uri, endpoint_url=endpoint)  # named, as fsspec's kept clients are told apart by it
    try:
        s3.pipe_file(path, data, mode="create")
    except OSError as error:
        answer = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if answer != "PreconditionFailed" and not isinstance(error, FileExistsError):
            raise


def parquet_bytes(table: pa.Table, **options: Any) -> pa.Buffer:
    """Return the bytes of `table` as a Parquet file; `options` go to pyarrow.parquet.write_table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def write_parquet(uri: str, table: pa.Table, **options: Any) -> None:
    """Write a Parquet file atomically; `options` go to pyarrow.parquet.write_table."""
    write_bytes(uri, parquet_bytes(table, **options))
