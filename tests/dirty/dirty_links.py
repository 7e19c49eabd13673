"""Kinds of lists of image URIs, as CSV and Parquet: rows that name nothing, name too much, or are no rows."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from dirty_kind import Kind, jpeg, parquet_bytes

Build = Callable[[Path, str], bytes]


def _kind(
    name: str,
    what: str,
    build: Build,
    *,
    kept: str = "a z",
    rejects: tuple[tuple[str, str], ...] = (),
    suffix: str = ".csv",
    **more: object,
) -> Kind:
    """A list beside the pictures a.jpg and z.jpg; build(folder, name) returns its bytes."""

    def write(folder: Path) -> str:
        inside = folder / f"pictures of {name}"
        inside.mkdir()
        for key in ("a", "z"):
            (inside / f"{key}.jpg").write_bytes(jpeg())
        (folder / f"{name}{suffix}").write_bytes(build(inside, name))
        return str(folder / f"{name}{suffix}")

    return Kind(name, "URI list", what, write, () if more.get("error") else tuple(kept.split()), rejects, **more)


def _row(name: str, key: str, uri: str = "", caption: str = "words") -> bytes:
    path = uri or f"pictures of {name}/{key}.jpg"
    return f"{name}/{key},{path},{caption}\n".encode("utf-8", "surrogateescape")


def _rows(*odd: bytes | Callable[[Path, str], bytes]) -> Build:
    """A header, a sound row "a", these bytes, and a sound row "z"."""

    def build(folder: Path, name: str) -> bytes:
        between = [one(folder, name) if callable(one) else one for one in odd]
        return b"key,uri,caption\n" + _row(name, "a") + b"".join(between) + _row(name, "z")

    return build


def _to(uri: str) -> Build:
    """A row "odd" that names this URI."""
    return _rows(lambda _, name: _row(name, "odd", uri))


def _file(data: bytes) -> Build:
    """A row "odd" that names a file with these bytes."""

    def odd(folder: Path, name: str) -> bytes:
        (folder / "odd.jpg").write_bytes(data)
        return _row(name, "odd")

    return _rows(odd)


def _pipe(folder: Path, name: str) -> bytes:
    os.mkfifo(folder / "odd.jpg")
    return _row(name, "odd")


def _parquet(**columns: Callable[[str], object]) -> Build:
    def build(_: Path, name: str) -> bytes:
        table = {
            "key": [f"{name}/a", f"{name}/z"],
            "uri": [f"pictures of {name}/a.jpg", f"pictures of {name}/z.jpg"],
        } | {column: values(name) for column, values in columns.items()}
        return parquet_bytes(pa.table(table))

    return build


def _two_columns(_: Path, name: str) -> bytes:
    table = pa.table({"key": [f"{name}/a"], "uri": ["a.jpg"]})
    return parquet_bytes(table.append_column("uri", table["uri"]))


KINDS = [
    _kind("links-missing-file", "a row whose picture is not there", _to("gone.jpg"), rejects=(("odd", "missing"),)),
    _kind("links-folder", "a row that names a folder", _rows(lambda f, name: _row(name, "odd", str(f))), rejects=(("odd", "missing"),)),
    _kind("links-pipe", "a row that names a pipe, which nobody ever fills", _rows(_pipe), rejects=(("odd", "missing"),)),
    _kind("links-empty-file", "a picture of zero bytes", _file(b""), rejects=(("odd", "empty_image"),)),
    _kind("links-html", "an error page for a picture", _file(b"<html>404</html>"), rejects=(("odd", "unreadable"),)),
    _kind("links-empty-uri", "a row without URI", _rows(lambda _, name: f"{name}/odd,,x\n".encode()), rejects=(("odd", "missing_uri"),)),
    _kind("links-empty-key", "a row without key", _rows(lambda _, name: f",pictures of {name}/z.jpg,x\n".encode()),
          rejects=(("=pictures of links-empty-key/z.jpg", "missing_key"),)),
    _kind("links-duplicate-key", "a key twice", _rows(lambda _, name: _row(name, "a")), rejects=(("a", "duplicate_key"),)),
    _kind("links-unknown-scheme", "a row with ftp://", _to("ftp://host/a.jpg"), rejects=(("odd", "unsafe_uri"),)),
    _kind("links-wrapped-scheme", "a URI wrapped in another", _to("simplecache::file:///etc/passwd"), rejects=(("odd", "unsafe_uri"),)),
    _kind("links-nul", "a zero byte in a URI", _to("a\0.jpg"), rejects=(("odd", "unsafe_uri"),)),
    _kind("links-latin-1", "a URI in Latin-1", _to("caf\udce9.jpg"), rejects=(("odd", "unsafe_uri"),)),
    _kind("links-latin-1-caption", "a caption in Latin-1", _rows(lambda _, name: _row(name, "odd", "", "caf\udce9")),
          rejects=(("odd", "bad_caption_encoding"),)),
    _kind("links-too-few-cells", "a row with two cells", _rows(b"odd,x\n"), rejects=(("", "bad_row"),)),
    _kind("links-too-many-cells", "a row with a comma that is not quoted", _rows(b"odd,x.jpg,one, two\n"), rejects=(("", "bad_row"),)),
    _kind("links-blank-lines", "blank lines", _rows(b"\n\r\n"), note="no rows"),
    _kind("links-open-quote", "a quote that is never closed", _rows(b'odd,"x.jpg,words\n' + b"y" * 200_000), error="is a quote not closed?"),
    _kind("links-byte-order-mark", "begins with a byte order mark", lambda f, name: b"\xef\xbb\xbf" + _rows()(f, name)),
    _kind("links-empty", "a file of zero bytes", lambda *_: b"", error="it is empty or has no header"),
    _kind("links-html-page", "an error page of a web server", lambda *_: b"<!DOCTYPE html>\n<title>404</title>\n", error="no column of URIs"),
    _kind("links-gzip", "a gzipped CSV named .csv", lambda f, name: gzip.compress(_rows()(f, name), mtime=0), error="it is compressed"),
    _kind("links-header-only", "a header without rows", lambda *_: b"key,uri\n", kept="", note="no rows"),
    _kind("links-parquet", "a Parquet list with a null URI", _parquet(uri=lambda name: [f"pictures of {name}/a.jpg", None]), kept="a",
          rejects=(("z", "missing_uri"),), suffix=".parquet"),
    _kind("links-parquet-numbers", "a Parquet list whose keys are floating point", _parquet(key=lambda _: [0.5, 1.5]),
          error="column key is double", suffix=".parquet"),
    _kind("links-parquet-two-columns", "a Parquet list with two columns named uri", _two_columns, error="column uri is there twice", suffix=".parquet"),
    _kind("links-beside-pictures", "pictures in a dictionary, beside a column of URLs",
          _parquet(image=lambda _: pa.array([jpeg(), jpeg()]).dictionary_encode(), uri=lambda _: ["https://x/a.jpg"] * 2),
          suffix=".parquet", note="the pictures count; nothing is fetched"),
]  # fmt: skip
