"""Files anywhere: one set of functions for local paths and every URI that pyarrow or fsspec can open.

A URI is a local path (relative ones count from the working directory), `file:///...`, an object store URI
(`s3://bucket/key`, `gs://`, `abfs://`, opened by pyarrow) or anything else fsspec knows (`memory://`,
`https://`). Keys of object stores are taken literally, never percent-decoded; `?name=value` at the end of
such a URI is an option of the file system, as in `s3://bucket/key?endpoint_override=127.0.0.1:9000`.

Every write is atomic: a reader sees the old file or the new one, whole. A file, folder or bucket that does
not exist and a refused access are `CirError`; other failures of the network stay `OSError`, so that callers
may retry them. No message repeats the credentials of a URI.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote, unquote

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cir_core.schema import CirError

_ARROW_SCHEMES = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"})
_SINGLE_PUT_SCHEMES = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "az", "http", "https", "memory", "oss", "hf"})
_QUERY = re.compile(r"\?[\w.-]+=[^?]*$")  # name=value, so that the ? of a glob stays in the path
_USERINFO = re.compile(r"^[^/@]+:.*@")  # a secret may hold an unquoted "/"
_USERINFO_OR_PORT = re.compile(r"^[^/@]+:(?!\d+(?:/|$)).*@")
_WEB_USERINFO = re.compile(r"^[^/@]+:(?!\d+(?:/|$))[^@]*@")
_MISSING = ("NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "Bucket does not exist", "not found")
_REFUSED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID")
_PARQUET_FAULTS = (
    "thrift",
    "orrupt",
    "Unexpected end",
    "magic",
    "Parquet",
)  # pyarrow raises OSError for these
_COPY_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a listing. name: its path below the listed folder, literally. modified_ns: 0 where the store is silent."""

    uri: str
    size_bytes: int
    name: str
    modified_ns: int


@dataclass(frozen=True, slots=True)
class _Parts:
    scheme: str  # "" for a plain local path
    netloc: str
    path: str  # without the leading "/" of a remote URI
    query: str  # "?..." or ""


def _split(uri: str) -> _Parts:
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _Parts("", "", uri, "")
    scheme = scheme.lower()
    if scheme == "file":
        return _Parts("file", "", unquote(rest[rest.find("/") :] if "/" in rest else rest), "")
    found = _QUERY.search(rest)
    query = found.group() if found else ""
    rest = rest[: len(rest) - len(query)]
    patterns = {"hdfs": _USERINFO_OR_PORT, "viewfs": _USERINFO_OR_PORT, "http": _WEB_USERINFO, "https": _WEB_USERINFO}
    userinfo = patterns.get(scheme, _USERINFO).match(rest)  # a bucket has no port
    start = userinfo.end() if userinfo else 0
    slash = rest.find("/", start)
    slash = len(rest) if slash < 0 else slash
    return _Parts(scheme, rest[:slash], rest[slash + 1 :], query)


def redact(uri: str) -> str:
    """Return the URI without user names, passwords and query strings: safe to print and to store."""
    parts = _split(uri)
    if parts.scheme in ("", "file"):
        return uri
    host = parts.netloc if parts.scheme.startswith("abfs") else parts.netloc.rpartition("@")[2]
    path = parts.path.partition("?")[0] if parts.scheme in ("http", "https") else parts.path
    return f"{parts.scheme}://{host}" + (f"/{path}" if path else "")


def query_of(uri: str) -> str:
    """Return the `?name=value` part of a remote URI, or ""."""
    return _split(uri).query


def _scrub(text: str, uri: str) -> str:
    parts = _split(uri)
    text = text.replace(uri, redact(uri))
    userinfo = parts.netloc.rpartition("@")[0]
    secrets = {userinfo, parts.query.lstrip("?"), *userinfo.split(":")}
    for secret in sorted(secrets | {unquote(secret) for secret in secrets}, key=len, reverse=True):
        text = text.replace(secret, "***") if secret else text
    return text


@contextmanager
def _clear_errors(uri: str) -> Iterator[None]:
    """Turn what a user can mend into CirError naming the URI; scrub the text of everything else."""
    name = redact(uri)
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise CirError(f"{name}: no such file, folder or bucket; check the path") from None
    except IsADirectoryError:
        raise CirError(f"{name}: is a folder, expected a file") from None
    except PermissionError as error:
        raise CirError(f"{name}: access refused ({_scrub(str(error), uri)}); check the permissions") from None
    except OSError as error:
        text = _scrub(str(error), uri)
        if any(mark in text for mark in _REFUSED):
            raise CirError(f"{name}: access refused ({text}); check the credentials") from None
        if any(mark in text for mark in _MISSING):
            raise CirError(f"{name}: no such file, folder or bucket ({text})") from None
        raise OSError(error.errno, f"{name}: {text}") from None


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system that holds `uri` and the path of `uri` in it.

    Clients of object stores are kept and shared inside a process. Raises CirError for a scheme nothing opens.
    """
    parts = _split(uri)
    if parts.scheme in ("", "file"):
        if not parts.path or "\0" in parts.path:
            raise CirError(f"{uri!r} is not a path")
        return pafs.LocalFileSystem(), str(Path(parts.path).absolute())
    with _clear_errors(uri):
        try:
            if parts.scheme in _ARROW_SCHEMES:
                opened, root = _arrow_filesystem(f"{parts.scheme}://{_quoted_netloc(parts.netloc)}/{parts.query}")
                return opened, f"{root.rstrip('/')}/{parts.path}".rstrip("/") if parts.path else root
            opened, path = fsspec.core.url_to_fs(uri)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError, ValueError) as error:
            detail = _scrub(str(error), uri)
            raise CirError(
                f"{redact(uri)}: cannot open this kind of URI ({detail}); use a local path, s3://, gs://, "
                "abfs:// or a scheme that an installed fsspec package provides"
            ) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(opened)), path


def _quoted_netloc(netloc: str) -> str:
    userinfo, at, host = netloc.rpartition("@")
    return quote(userinfo, safe=":%") + at + host


@lru_cache(maxsize=64)
def _arrow_filesystem(root_uri: str) -> tuple[pafs.FileSystem, str]:
    return cast(tuple[pafs.FileSystem, str], pafs.FileSystem.from_uri(root_uri))


def is_local(uri: str) -> bool:
    """Whether `uri` is a file of this machine."""
    return _split(uri).scheme in ("", "file")


def local_path(uri: str) -> Path:
    """Return the absolute path of a local URI; CirError for any other."""
    if not is_local(uri):
        raise CirError(f"{redact(uri)}: expected a local path")
    return Path(filesystem(uri)[1])


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI, before its query string.

    >>> join("s3://bucket/a?region=eu-west-1", "b", "c.parquet")
    's3://bucket/a/b/c.parquet?region=eu-west-1'
    """
    split = _split(uri)
    if not split.netloc and split.scheme not in ("", "file"):
        raise CirError(f"{redact(uri)!r} names no bucket or host; expected {split.scheme}://<bucket>/<folder>")
    query = split.query
    base = uri[: len(uri) - len(query)] if query else uri
    cleaned = [part.strip("/") for part in parts]
    if any(not part for part in cleaned):
        raise CirError(f"join({redact(uri)!r}, ...): empty path part in {parts!r}")
    if split.scheme == "file":
        cleaned = [quote(part) for part in cleaned]
    return "/".join([base.rstrip("/"), *cleaned]) + query


def _info(uri: str) -> pafs.FileInfo:
    opened, path = filesystem(uri)
    with _clear_errors(uri):
        return opened.get_file_info(path)


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
        raise CirError(f"{redact(uri)}: no such file, folder or bucket; check the path")
    if info.type == pafs.FileType.Directory or info.size is None:
        raise CirError(f"{redact(uri)}: is not a file with a known size")
    return int(info.size)


@contextmanager
def open_stream(uri: str) -> Iterator[BinaryIO]:
    """Open for sequential reading, without decompression. Local files can seek as well."""
    opened, path = filesystem(uri)
    with _clear_errors(uri):
        if is_local(uri):
            with Path(path).open("rb") as stream:
                yield stream
        else:
            with opened.open_input_stream(path, compression=None, buffer_size=1 << 20) as stream:
                yield cast(BinaryIO, stream)


@contextmanager
def open_random(uri: str) -> Iterator[pa.NativeFile]:
    """Open for random access, as `pyarrow.parquet.ParquetFile` needs it."""
    opened, path = filesystem(uri)
    with _clear_errors(uri), opened.open_input_file(path) as file:
        yield file


@contextmanager
def open_parquet(uri: str, what: str = "file") -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; damage, seen now or while reading, is a CirError "unreadable <what> <uri>"."""
    with open_random(uri) as raw:
        try:
            yield pq.ParquetFile(raw, pre_buffer=not is_local(uri))
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and not any(mark in str(error) for mark in _PARQUET_FAULTS):
                raise
            raise CirError(f"unreadable {what} {redact(uri)}: not a sound Parquet file ({error})") from None


def read_bytes(uri: str) -> bytes:
    """Return a whole file."""
    with open_stream(uri) as stream:
        return stream.read()


def read_range(uri: str, offset: int, length: int) -> bytes:
    """Return the bytes [offset, offset + length) in one ranged read; fewer where the file ends earlier."""
    with open_random(uri) as file:
        return cast(bytes, file.read_at(length, offset))


@contextmanager
def open_atomic(uri: str) -> Iterator[BinaryIO]:
    """Open for writing; the file appears, whole, only when the block ends without an exception.

    Local: a temporary name in the same folder, fsync, rename; missing folders are made. Object stores: the
    bytes are collected in a local temporary file and uploaded at the end; nothing appears if the block
    raises.
    """
    if is_local(uri):
        with _clear_errors(uri), _local_atomic(local_path(uri)) as local:
            yield local
        return
    with tempfile.TemporaryFile() as buffer:
        yield cast(BinaryIO, buffer)
        buffer.seek(0)
        _upload(uri, cast(BinaryIO, buffer))


@contextmanager
def _local_atomic(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
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
    single_put = _split(uri).scheme in _SINGLE_PUT_SCHEMES
    target = path if single_put else f"{path}.{uuid.uuid4().hex}.tmp"
    with _clear_errors(uri):
        if not single_put:
            opened.create_dir(path.rpartition("/")[0], recursive=True)
        with opened.open_output_stream(target, compression=None) as stream:
            shutil.copyfileobj(source, stream, _COPY_BYTES)
        if not single_put:
            opened.move(target, path)


def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a file atomically (see `open_atomic`)."""
    if is_local(uri):
        with open_atomic(uri) as stream:
            stream.write(data)
    else:
        _upload(uri, io.BytesIO(data))


def list_files(uri: str, recursive: bool = True) -> list[StoredFile]:
    """Return the files of a folder with their sizes in bytes, sorted by name; each URI opens as it stands."""
    opened, path = filesystem(uri)
    with _clear_errors(uri):
        if opened.get_file_info(path).type == pafs.FileType.File:
            raise NotADirectoryError(path)
        infos = opened.get_file_info(pafs.FileSelector(path, recursive=recursive))
    base = path.strip("/") + "/"
    found = [info for info in infos if info.type == pafs.FileType.File]
    entries = sorted((_below(base, info.path), int(info.size), int(info.mtime_ns or 0)) for info in found)
    return [StoredFile(join(uri, name), size, name, modified) for name, size, modified in entries]


def _below(base: str, path: str) -> str:
    path = path.lstrip("/")
    return path[len(base) :] if path.startswith(base) else path


def read_json(uri: str) -> Any:
    """Return the parsed JSON of a file; CirError if it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CirError(f"{redact(uri)}: not a JSON file ({error})") from None


def write_json(uri: str, value: object) -> None:
    """Write JSON atomically: sorted keys, indented, a newline at the end. NaN is refused: it is not JSON."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(uri, (text + "\n").encode())


def parquet_bytes(table: pa.Table, **options: Any) -> pa.Buffer:
    """Return the bytes of `table` as a Parquet file; `options` go to pyarrow.parquet.write_table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def write_parquet(uri: str, table: pa.Table, **options: Any) -> None:
    """Write a Parquet file atomically; `options` go to pyarrow.parquet.write_table."""
    write_bytes(uri, parquet_bytes(table, **options))
