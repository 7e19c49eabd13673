"""What a kind of dirty data is, how its shard is read to the end, and the healthy samples that lie beside the dirt."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from cir_core.preprocessing import ImageError, Preprocessing, preprocess_image
from cir_core.schema import Reject
from cir_core.shards import index_image_folder, read_shard, read_slice_rows

PREPROCESSING = Preprocessing(64)
Group = Literal["tar", "caption", "picture", "Parquet", "URI list", "folder", "list", "embedding"]


@dataclass(frozen=True)
class End:
    """How reading ends: the keys that are kept and the (key, reason) of every reject, both in stored order."""

    kept: tuple[str, ...]
    rejects: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Kind:
    """One kind of input. kept and rejects name keys below the kind's own folder, so that no two kinds share a key.

    write: makes it in a folder and returns what a user would give: a shard, a folder, a pattern, a list of them.
    error: what the message of the CirError holds; "" if the input opens.
    note: what a reader of the table should know besides. captions: of kept keys, where they are the point.
    as_if: the plain file whose pixels, as open_clip sees them, the key "odd" must have; None: its own file's.
    """

    name: str
    group: Group
    what: str
    write: Callable[[Path], str | list[str]]
    kept: tuple[str, ...] = ()
    rejects: tuple[tuple[str, str], ...] = ()
    error: str = ""
    note: str = ""
    captions: Mapping[str, str] = field(default_factory=dict)
    require_caption: bool = False
    compare: bool = False
    as_if: Callable[[], bytes] | None = None

    def key(self, short: str) -> str:
        """Return the full key: names that are absolute, climb or are empty stand for themselves, and "=x" for x."""
        if self.group in ("folder", "list"):
            return short
        if short.startswith("="):
            return short[1:]
        return short if not short or short.startswith(("/", "../")) else f"{self.name}/{short}"

    @property
    def end(self) -> End:
        """The end with full keys."""
        return End(
            tuple(self.key(one) for one in self.kept), tuple((self.key(one), reason) for one, reason in self.rejects)
        )


def end_of_shard(uri: str, *, require_caption: bool) -> End:
    """Read a shard to its end and decode every picture, as the embedding job does."""
    return _end(list(read_shard(uri, require_caption=require_caption)))


def end_of_folder(uri: str) -> End:
    """Read a folder of pictures to its end, slice by slice."""
    index = index_image_folder(uri, slice_rows=2)
    rows = [row for part in index.slices for row in read_slice_rows(part, require_caption=False)]
    return _end([*rows, *index.rejects])


def _end(rows: Sequence[object]) -> End:
    kept, rejects = list[str](), list[tuple[str, str]]()
    for row in rows:
        if isinstance(row, Reject):
            rejects.append((row.key, row.reason))
            continue
        try:
            preprocess_image(row.image, PREPROCESSING)
        except ImageError as error:
            rejects.append((row.key, error.reason))
        else:
            kept.append(row.key)
    return End(tuple(kept), tuple(rejects))


# ---- healthy things


def photo(width: int = 90, height: int = 70, mode: str = "RGB") -> Image.Image:
    """Return a picture with an ellipse on noise; below twice the model's size, so no decoder may scale it down."""
    rng = np.random.default_rng(7)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(200, 30, 60, 120))
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """Return the bytes of an image file."""
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


@lru_cache
def jpeg() -> bytes:
    """Return a sound JPEG."""
    return encode(photo(), "JPEG", quality=90)


Member = tuple[str | tarfile.TarInfo, bytes]


def sample(name: str, key: str) -> list[Member]:
    """Return the members of a healthy sample."""
    return [(f"{name}/{key}.jpg", jpeg()), (f"{name}/{key}.txt", f"the picture {key}".encode())]


def tar_bytes(members: Sequence[Member], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar; a TarInfo is written as it is, its size included."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for name, data in members:
            info = name
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def with_neighbours(name: str, *odd: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of a healthy sample "a", these members, and a healthy sample "z"."""
    return tar_bytes([*sample(name, "a"), *odd, *sample(name, "z")], form)


def parquet_bytes(table: pa.Table, **options: object) -> bytes:
    """Return a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def file_writer(name: str, suffix: str, build: Callable[[str], bytes]) -> Callable[[Path], str]:
    """Return a Kind.write that stores what `build(name)` returns as `<name><suffix>`."""

    def write(folder: Path) -> str:
        path = folder / f"{name}{suffix}"
        path.write_bytes(build(name))
        return str(path)

    return write
