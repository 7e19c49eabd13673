"""Kinds of Parquet shards: wrong columns, wrong types, nulls, damaged files, and layouts that are only odd."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
from dirty_kind import Kind, file_writer, jpeg, parquet_bytes

NAMES = ("a", "odd", "z")


def _columns(name: str, **other: object) -> dict[str, object]:
    """The columns of three samples; `other` replaces or adds columns, None leaves one out."""
    columns: dict[str, object] = {
        "key": [f"{name}/{key}" for key in NAMES],
        "image": [jpeg()] * 3,
        "caption": [f"the picture {key}" for key in NAMES],
    }
    return {column: values for column, values in (columns | other).items() if values is not None}


def _odd(column: str, value: object) -> Callable[[str], bytes]:
    """Three samples; the one in the middle has this value in a column."""

    def build(name: str) -> bytes:
        columns = _columns(name)
        columns[column] = [value if row == 1 else one for row, one in enumerate(columns[column])]
        return parquet_bytes(pa.table(columns))

    return build


def _with(column: str, values: Callable[[list], object]) -> Callable[[str], bytes]:
    """Three samples; values: what to store in a column instead of its three values."""
    return lambda name: parquet_bytes(pa.table(_columns(name, **{column: values(_columns(name)[column])})))


def _without(column: str) -> Callable[[str], bytes]:
    return lambda name: parquet_bytes(pa.table(_columns(name, **{column: None})))


def _sound(name: str, **options: object) -> bytes:
    return parquet_bytes(pa.table(_columns(name)), **options)


def _damaged_pages(compression: str) -> Callable[[str], bytes]:
    """The pages of the images are overwritten, the footer is sound."""

    def build(name: str) -> bytes:
        data = bytearray(_sound(name, compression=compression, use_dictionary=False))
        page = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(0).column(1).data_page_offset
        data[page + 40 : page + 6000] = b"\xa5" * 5960
        return bytes(data)

    return build


def _twice(name: str) -> bytes:
    table = pa.table(_columns(name))
    return parquet_bytes(table.append_column("image", table["image"]))


def _empty(*, groups: bool) -> Callable[[str], bytes]:
    def build(name: str) -> bytes:
        table = pa.table(_columns(name)).slice(0, 0)
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema) as writer:
            if groups:
                writer.write_table(table)
        return sink.getvalue().to_pybytes()

    return build


def _hugging_face(name: str) -> bytes:
    images = [{"bytes": jpeg(), "path": "a"}, {"bytes": None, "path": "b"}, {"bytes": jpeg(), "path": None}]
    return parquet_bytes(pa.table(_columns(name, image=images)))


def _missing_struct(name: str) -> bytes:
    images = pa.array([{"bytes": jpeg()}, None, {"bytes": jpeg()}])
    return parquet_bytes(pa.table(_columns(name, image=images)))


def _kind(
    name: str,
    what: str,
    build: Callable[[str], bytes],
    *,
    kept: str = "a z",
    rejects: tuple[tuple[str, str], ...] = (),
    **more,
) -> Kind:
    return Kind(name, "Parquet", what, file_writer(name, ".parquet", build), tuple(kept.split()), rejects, **more)


def _fatal(name: str, what: str, build: Callable[[str], bytes], error: str, **more) -> Kind:
    return Kind(name, "Parquet", what, file_writer(name, ".parquet", build), error=error, **more)


ALL = "a odd z"
DAMAGED = "not a sound Parquet file"


FILES = [
    _fatal("parquet-cut", "the file ends before its footer", lambda name: _sound(name)[:-400], DAMAGED),
    _fatal("parquet-cut-footer", "the footer announces more than there is",
           lambda name: _sound(name)[:-8] + b"\xff\xff\xff\x7fPAR1", DAMAGED),
    _fatal("parquet-damaged-footer", "the footer is overwritten", lambda name: _sound(name)[:-200] + b"\xa5" * 192 + _sound(name)[-8:], DAMAGED),
    _fatal("parquet-zero-bytes", "a file of zero bytes", lambda _: b"", DAMAGED),
    _fatal("parquet-html", "an error page of a web server", lambda _: b"<!DOCTYPE html><title>404</title>" * 40, DAMAGED),
    _fatal("parquet-csv", "a CSV that is named .parquet", lambda _: b"key,image\n" * 100, DAMAGED),
    _fatal("parquet-encrypted", "an encrypted file", lambda name: _sound(name)[:-4] + b"PARE", DAMAGED),
    _fatal("parquet-damaged-snappy", "damaged pages under a sound footer, snappy", _damaged_pages("snappy"), DAMAGED),
    _fatal("parquet-damaged-gzip", "damaged pages under a sound footer, gzip", _damaged_pages("gzip"), DAMAGED),
    _fatal("parquet-damaged-zstd", "damaged pages under a sound footer, zstd", _damaged_pages("zstd"), DAMAGED),
    _fatal("parquet-damaged-lz4", "damaged pages under a sound footer, lz4", _damaged_pages("lz4"), DAMAGED),
    _kind("parquet-damaged-plain", "damaged pages under a sound footer, not compressed", _damaged_pages("none"), kept="odd z",
          rejects=(("a", "unreadable"),), note="what is not hit is kept"),
    _kind("parquet-zero-rows", "a row group without rows", _empty(groups=True), kept="", note="no rows"),
    _kind("parquet-zero-row-groups", "a file without row groups", _empty(groups=False), kept="", note="no rows"),
]  # fmt: skip

COLUMNS = [
    _fatal("parquet-no-key", "no column for keys", _without("key"), "no key column"),
    _fatal("parquet-no-image", "no column for pictures", _without("image"), "no image column"),
    _fatal("parquet-no-caption", "no column for captions, and captions are required", _without("caption"), "no caption column",
           require_caption=True),
    _kind("parquet-no-caption-needed", "no column for captions, and none are required", _without("caption"), kept=ALL),
    _fatal("parquet-two-images", "two columns of one name", _twice, "column image is there twice"),
    _fatal("parquet-image-strings", "pictures as text, such as URLs", _with("image", lambda v: ["https://x/y.jpg"] * 3), "column image is string"),
    _fatal("parquet-image-numbers", "numbers for pictures", _with("image", lambda v: [1, 2, 3]), "column image is int64"),
    _fatal("parquet-image-lists", "pictures as lists of numbers", _with("image", lambda v: [list(one) for one in v]), "column image is list"),
    _fatal("parquet-image-struct", "a struct without bytes", _with("image", lambda v: [{"url": "x"}] * 3), "expected a field 'bytes'"),
    _fatal("parquet-image-nulls", "a column of nulls only", _with("image", lambda v: pa.nulls(3)), "column image is null"),
    _kind("parquet-image-dictionary", "pictures in a dictionary", _with("image", lambda v: pa.array(v).dictionary_encode()), kept=ALL),
    _kind("parquet-image-large", "pictures as large_binary", _with("image", lambda v: pa.array(v, pa.large_binary())), kept=ALL),
    _kind("parquet-image-view", "pictures as binary_view", _with("image", lambda v: pa.array(v, pa.binary_view())), kept=ALL),
    _kind("parquet-hugging-face", "pictures as struct<bytes, path>, one without bytes", _hugging_face, rejects=(("odd", "missing_image"),)),
    _kind("parquet-hugging-face-null", "pictures as struct<bytes>, one of them null", _missing_struct, rejects=(("odd", "missing_image"),)),
    _fatal("parquet-key-floats", "floating point keys", _with("key", lambda v: [0.1, 0.2, 0.3]), "column key is double"),
    _fatal("parquet-key-booleans", "keys that are true or false", _with("key", lambda v: [True, False, True]), "column key is bool"),
    _fatal("parquet-key-lists", "keys that are lists", _with("key", lambda v: [[one] for one in v]), "column key is list"),
    _fatal("parquet-key-structs", "keys that are structs", _with("key", lambda v: [{"id": one} for one in v]), "column key is struct"),
    _kind("parquet-key-numbers", "whole numbers as keys", _with("key", lambda v: [-1, 0, 2**63 - 1]),
          kept=f"=-1 =0 ={2**63 - 1}", note="they become text"),
    _kind("parquet-key-dictionary", "keys in a dictionary", _with("key", lambda v: pa.array(v).dictionary_encode()), kept=ALL),
    _kind("parquet-key-view", "keys as string_view", _with("key", lambda v: pa.array(v, pa.string_view())), kept=ALL),
    _fatal("parquet-caption-numbers", "numbers as captions", _with("caption", lambda v: [1, 2, 3]), "column caption is int64"),
    _fatal("parquet-caption-lists", "lists of captions", _with("caption", lambda v: [[one] for one in v]), "column caption is list"),
    _kind("parquet-caption-nulls", "a column of nulls for captions", _with("caption", lambda v: pa.nulls(3)), kept=ALL, note="no captions"),
]  # fmt: skip

ROWS = [
    _kind("parquet-null-key", "a row without key", _odd("key", None), rejects=(("", "missing_key"),)),
    _kind("parquet-empty-key", "a row with an empty key", _odd("key", ""), rejects=(("", "missing_key"),)),
    _kind("parquet-duplicate-key", "a key twice",
          lambda name: parquet_bytes(pa.table(_columns(name, key=[f"{name}/{key}" for key in ("a", "z", "a")]))),
          rejects=(("a", "duplicate_key"),), note="the first is kept"),
    _kind("parquet-null-image", "a row without picture", _odd("image", None), rejects=(("odd", "missing_image"),)),
    _kind("parquet-empty-image", "a picture of zero bytes", _odd("image", b""), rejects=(("odd", "empty_image"),)),
    _kind("parquet-html-image", "an error page for a picture", _odd("image", b"<html>404</html>"), rejects=(("odd", "unreadable"),)),
    _kind("parquet-65-mib-image", "a picture of 65 MiB", _odd("image", bytes(65 << 20)), rejects=(("odd", "sample_too_large"),)),
    _kind("parquet-null-caption", "a row without caption, and captions are required", _odd("caption", None),
          rejects=(("odd", "missing_caption"),), require_caption=True),
    _kind("parquet-broken-caption", "a caption that is not UTF-8",
          _with("caption", lambda v: pa.array([b"a", b"\xff", b"z"]).view(pa.string())), rejects=(("odd", "bad_caption_encoding"),)),
    _kind("parquet-broken-key", "a key that is not UTF-8",
          lambda name: parquet_bytes(pa.table(_columns(name, key=pa.array(
              [f"{name}/a".encode(), f"{name}/o\xff".encode("latin-1"), f"{name}/z".encode()]).view(pa.string())))),
          rejects=(("o\ufffd", "unsafe_path"),)),
]  # fmt: skip

KINDS = FILES + COLUMNS + ROWS
