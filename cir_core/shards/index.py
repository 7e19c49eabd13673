"""Index and read shards of any kind."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from cir_core import files
from cir_core.schema import CirError, Reject
from cir_core.shards import images, linked, parquet, tar
from cir_core.shards.model import (
    Row,
    Sample,
    ShardIndex,
    Slice,
    SliceBuilder,
    check_count,
    read_part,
    read_rows,
    sort_rows,
)
from cir_core.shards.uri_list import is_uri_list


def _is_parquet(uri: str) -> bool:
    name = files.redact(uri)
    if name.endswith(".parquet"):
        return True
    if name.endswith(".tar"):
        return False
    raise CirError(
        f"{name}: a shard's name ends in .tar or .parquet, a list's in .csv or .parquet (decompress a .tar.gz: slices "
        "need random access)"
    )


def index_shard(uri: str, *, slice_rows: int = 256, require_caption: bool = True) -> ShardIndex:
    """Count the samples of a shard and cut it into slices of about `slice_rows` samples; decodes no image.

    A local tar is skipped through; a remote one is streamed once. Index and reading must agree on
    `require_caption`. Of a list of URIs (see `uri_list`) only the list is read: an image that is not there shows
    later. Raises CirError for a file that is not what its suffix says; every smaller fault is a Reject in the index.
    """
    if slice_rows < 1:
        raise CirError(f"slice_rows must be at least 1, not {slice_rows}")
    if is_uri_list(uri):
        return linked.index_list(uri, slice_rows=slice_rows, require_caption=require_caption)
    if _is_parquet(uri):
        return parquet.index_parquet(uri, slice_rows=slice_rows, require_caption=require_caption)
    name = files.redact(uri)
    builder, rejects = SliceBuilder(uri, slice_rows), list[Reject]()
    with tar.open_tar(uri) as stream:
        rows = tar.tar_rows(stream, load=False, name=name)
        for row, verdict in sort_rows(rows, shard=name, require_caption=require_caption):
            if isinstance(verdict, Reject):
                rejects.append(verdict)
                builder.pass_over(duplicate=verdict.reason == "duplicate_key")
            else:
                builder.add(row.start, row.end)
    builder.close()
    return ShardIndex(uri, builder.num_samples, tuple(builder.slices), tuple(rejects), files.size_bytes(uri))


def read_shard(uri: str, *, require_caption: bool = True) -> Iterator[Sample | Reject]:
    """Stream a whole shard in stored order; holds one sample at a time (a few rows for Parquet and lists of URIs).

    Raises CirError for a file that is not what its suffix says, OSError if a store does not answer.
    """
    name = files.redact(uri)
    if is_uri_list(uri):
        yield from linked.read_list(uri, require_caption=require_caption)
    elif _is_parquet(uri):
        with parquet.open_parquet(uri, require_caption=require_caption) as shard:
            rows = parquet.parquet_rows(shard, range(shard.num_row_groups), load=True)
            yield from read_rows(rows, shard=name, require_caption=require_caption)
    else:
        with tar.open_tar(uri) as stream:
            rows = tar.tar_rows(stream, load=True, name=name)
            yield from read_rows(rows, shard=name, require_caption=require_caption)


def read_captions(uri: str) -> Iterator[tuple[str, str]]:
    """Yield key and caption of exactly the samples that `index_shard` counts, in the order of `Sample.row`.

    Images are skipped as in `index_shard`. Raises CirError for a file that is not what its suffix says.
    """
    name = files.redact(uri)
    if is_uri_list(uri):
        yield from linked.list_captions(uri)
    elif _is_parquet(uri):
        with parquet.open_parquet(uri, require_caption=True) as shard:
            yield from _captions(parquet.parquet_rows(shard, range(shard.num_row_groups), load=False), name)
    else:
        with tar.open_tar(uri) as stream:
            yield from _captions(tar.tar_rows(stream, load=False, name=name), name)


def _captions(rows: Iterator[Row], name: str) -> Iterator[tuple[str, str]]:
    for row, verdict in sort_rows(rows, shard=name, require_caption=True):
        if not isinstance(verdict, Reject):
            yield row.key, verdict


def read_slice(part: Slice, *, require_caption: bool = True) -> Iterator[Sample]:
    """Yield exactly the `part.num_rows` samples that were counted, in order; one ranged read for a tar.

    Where images lie in files of their own, in a folder or a list of URIs, one that cannot be had is a Sample with
    `image` b"", which no decoder takes; `read_slice_rows` says why. Raises CirError if the shard was changed since
    it was indexed, OSError if a store does not answer.
    """
    for position, row in enumerate(read_slice_rows(part, require_caption=require_caption), start=part.first_row):
        yield Sample(row.shard, row.key, position, b"", "") if isinstance(row, Reject) else row


def read_slice_rows(part: Slice, *, require_caption: bool = True) -> Iterator[Sample | Reject]:
    """As `read_slice`, but an image or caption file that cannot be used is a Reject in its place.

    Only folders and lists of URIs give any: the slices of other shards hold counted samples alone.
    """
    return check_count(part, _slice_rows(part, require_caption=require_caption))


def _slice_rows(part: Slice, *, require_caption: bool) -> Iterator[Sample | Reject]:
    name = files.redact(part.shard)
    if part.files:
        yield from images.read_folder_slice(part, require_caption=require_caption)
    elif part.links:
        yield from linked.read_list_slice(part, require_caption=require_caption)
    elif _is_parquet(part.shard):
        with parquet.open_parquet(part.shard, require_caption=require_caption) as shard:
            if part.offset + part.length > shard.num_row_groups:
                return
            groups = range(part.offset, part.offset + part.length)
            rows = parquet.parquet_rows(shard, groups, load=True)
            yield from read_part(rows, part, shard=name, require_caption=require_caption)
    else:
        yield from read_part(tar.slice_rows(part), part, shard=name, require_caption=require_caption)


def find_images(shards: Iterable[str], keys: Collection[str]) -> dict[str, bytes]:
    """Return the encoded images with these keys, reading shards one after the other until all are found."""
    wanted, found = frozenset(keys), dict[str, bytes]()
    for shard in shards:
        for row in read_shard(shard, require_caption=False):
            if isinstance(row, Sample) and row.key in wanted:
                found[row.key] = row.image
        if len(found) == len(wanted):
            break
    return found
