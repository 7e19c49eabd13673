"""Lists of image URIs as shards to train on: counted without touching an image, fetched row by row when read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cir_core import files
from cir_core.schema import AccessError, CirError, Reject, SchemeError
from cir_core.shards.fetch import fetch_image, in_order
from cir_core.shards.list_rows import list_rows, range_rows
from cir_core.shards.model import MAX_SAMPLE_BYTES, Sample, ShardIndex, Slice, SliceBuilder, UnusableError
from cir_core.shards.uri_list import Link, judge_link, read_links, sort_links

Fetched = bytes | UnusableError


def index_list(uri: str, *, slice_rows: int, require_caption: bool) -> ShardIndex:
    """Count the links of a list; whether an image is there shows only when it is read."""
    builder, rejects = SliceBuilder(uri, slice_rows), list[Reject]()
    for row, verdict in sort_links(list_rows(uri), uri, require_caption=require_caption):
        if isinstance(verdict, Reject):
            rejects.append(verdict)
            builder.pass_over(duplicate=verdict.reason == "duplicate_key")
        else:
            builder.add(row.start, row.end)
    builder.close()
    slices = tuple(replace(part, links=True) for part in builder.slices)
    return ShardIndex(uri, builder.num_samples, slices, tuple(rejects), files.size_bytes(uri))


def read_list(uri: str, *, require_caption: bool) -> Iterator[Sample | Reject]:
    """Stream a whole list; an image that cannot be had is a Reject, and keeps its number all the same."""
    verdicts = (verdict for _, verdict in sort_links(list_rows(uri), uri, require_caption=require_caption))
    yield from _fetch_all(verdicts, files.redact(uri), 0)


def list_captions(uri: str) -> Iterator[tuple[str, str]]:
    """Yield key and caption of the rows that `index_list` counts as samples, captions required; fetches no image."""
    for _, verdict in sort_links(list_rows(uri), uri, require_caption=True):
        if not isinstance(verdict, Reject):
            yield verdict.key, verdict.caption or ""


def read_list_slice(part: Slice, *, require_caption: bool) -> Iterator[Sample | Reject]:
    """Yield the rows that `index_list` counted: a Sample each, or the Reject of an image that cannot be had."""
    yield from _fetch_all(_slice_links(part, require_caption=require_caption), files.redact(part.shard), part.first_row)


def read_list_rows(part: Slice) -> Iterator[Sample | Reject]:
    """Yield a Sample or a Reject for each of the `part.num_rows` rows of a slice of `cut_uri_list`, in order.

    Captions are not required. Raises CirError if the list was changed since it was cut, OSError if a store does not answer.
    """
    yield from _fetch_all(read_links(part), files.redact(part.shard), part.first_row)


def _slice_links(part: Slice, *, require_caption: bool) -> Iterator[Link]:
    skip = frozenset(part.skip)
    for index, row in enumerate(range_rows(part)):
        if index in skip:
            continue
        try:
            yield judge_link(row, part.shard, require_caption=require_caption)
        except UnusableError:
            continue


def _fetch_all(verdicts: Iterator[Link | Reject], name: str, position: int) -> Iterator[Sample | Reject]:
    for verdict, image in in_order(_fetched, verdicts):
        if isinstance(verdict, Reject):
            yield verdict
            continue
        if isinstance(image, bytes):
            yield Sample(name, verdict.key, position, image, verdict.caption or "")
        else:
            yield Reject(name, verdict.key, image.reason, image.detail)
        position += 1


def _fetched(verdict: Link | Reject) -> tuple[Link | Reject, Fetched]:
    return verdict, b"" if isinstance(verdict, Reject) else fetch_sample(verdict.uri)


def fetch_sample(uri: str) -> Fetched:
    """Return an image's bytes, or why it cannot be a sample.

    Raises:
        AccessError, SchemeError, OSError: see `fetch_image`; none of them is the image's fault.
    """
    try:
        image = fetch_image(uri)
    except (AccessError, SchemeError):
        raise
    except CirError as error:
        return UnusableError("missing", str(error))
    if not image:
        return UnusableError("empty_image")
    if len(image) > MAX_SAMPLE_BYTES:
        return UnusableError("sample_too_large", f"more than {MAX_SAMPLE_BYTES} bytes")
    return image
