"""Write shards: the same samples give the same bytes, and a shard appears whole or not at all."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from cir_core import files
from cir_core.schema import IMAGE_TEXT_SCHEMA, CirError
from cir_core.shards.model import IMAGE_SUFFIXES

RawSample = tuple[str, bytes, str, str | None]
"""key, image bytes, image suffix without the dot, caption or None."""


def write_tar_shard(uri: str, samples: Iterable[RawSample]) -> int:
    """Write a WebDataset tar of {key}.{suffix} and {key}.txt members; return the number of samples.

    Raises CirError for a key that is empty, repeated, absolute, climbs with ".." or has a dot in its last
    part (WebDataset splits names there), and for a suffix that is not an image's.
    """
    count = 0
    with (
        files.open_atomic(uri) as sink,
        tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for key, image, suffix, caption in _checked(samples, dots=False):
            _add(archive, f"{key}.{suffix}", image)
            if caption is not None:
                _add(archive, f"{key}.txt", caption.encode("utf-8"))
            count += 1
    return count


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # mtime, uid and gid are 0 and mode is 0644 unless set
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_parquet_shard(uri: str, samples: Iterable[RawSample], *, row_group_rows: int = 256) -> int:
    """Write a Parquet shard (IMAGE_TEXT_SCHEMA) from the same samples; return their number.

    The suffix is checked and not stored. Images are left uncompressed: they already are compressed.
    """
    count, batch = 0, list[RawSample]()
    compression = {"key": "zstd", "caption": "zstd", "image": "none"}
    with (
        files.open_atomic(uri) as sink,
        pq.ParquetWriter(
            sink, IMAGE_TEXT_SCHEMA, compression=compression, use_dictionary=False, write_statistics=["key"]
        ) as writer,
    ):
        for sample in _checked(samples, dots=True):
            batch.append(sample)
            count += 1
            if len(batch) == row_group_rows:
                writer.write_table(_table(batch))
                batch = []
        if batch:
            writer.write_table(_table(batch))
    return count


def _table(batch: list[RawSample]) -> pa.Table:
    columns = [[sample[position] for sample in batch] for position in (0, 1, 3)]
    return pa.Table.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, IMAGE_TEXT_SCHEMA, strict=True)],
        schema=IMAGE_TEXT_SCHEMA,
    )


def _checked(samples: Iterable[RawSample], *, dots: bool) -> Iterator[RawSample]:
    seen: set[str] = set()
    for sample in samples:
        key, suffix = sample[0], sample[2]
        parts = key.split("/")
        bad_name = not all(parts) or ".." in parts or parts[0] == "." or "\0" in key
        if bad_name or (not dots and "." in parts[-1]):
            raise CirError(f"key {key!r}: expected a relative path without '..' or a dot in its last part")
        if key in seen:
            raise CirError(f"key {key!r} is given twice; keys are unique in a shard")
        if suffix not in IMAGE_SUFFIXES:
            raise CirError(f"key {key!r}: suffix {suffix!r} is not one of {', '.join(IMAGE_SUFFIXES)}")
        seen.add(key)
        yield sample
