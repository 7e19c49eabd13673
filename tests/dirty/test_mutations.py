"""Shards and pictures of the table with a few bytes changed, cut, doubled or removed: they end in order, every time."""

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from dirty_kind import PREPROCESSING, encode, photo
from dirty_table import SHARDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cir_core.preprocessing import IMAGE_ERROR_REASONS, ImageError, preprocess_image
from cir_core.schema import CirError, Reject
from cir_core.shards import REJECT_REASONS, Sample, index_shard, read_shard, read_slice

_LARGE = 1 << 20
_EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80")

changes = st.lists(
    st.tuples(
        st.floats(0, 0.9999),
        st.one_of(
            st.binary(min_size=1, max_size=4),
            st.sampled_from(_EXTREMES),
            st.sampled_from(["cut", "double", "remove"]),
        ),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data, steps):
    for place, step in steps:
        at = int(place * len(data))
        if isinstance(step, bytes):
            data = data[:at] + step + data[at + len(step) :]
        elif step == "cut":
            data = data[:at]
        else:
            again = data[at : at + 512] if step == "double" else b""
            data = data[:at] + again + (data[at:] if again else data[at + 512 :])
    return data


@lru_cache
def stored(suffix):
    """The bytes of every small shard of the table with this suffix."""
    with TemporaryDirectory() as folder:
        paths = [Path(kind.write(Path(folder))) for kind in SHARDS if kind.group in ("tar", "caption", "Parquet")]
        return [path.read_bytes() for path in paths if path.suffix == suffix and path.stat().st_size < _LARGE]


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(which=st.integers(0, 10_000), steps=changes, slice_rows=st.integers(1, 4), require_caption=st.booleans())
def test_changed_shards_keep_their_accounts(suffix, which, steps, slice_rows, require_caption, tmp_path_factory):
    shards = stored(suffix)
    path = tmp_path_factory.getbasetemp() / f"changed{suffix}"
    path.write_bytes(mutated(shards[which % len(shards)], steps))
    try:
        rows = list(read_shard(str(path), require_caption=require_caption))
    except CirError:
        with pytest.raises(CirError):
            index_shard(str(path), require_caption=require_caption)
        return
    index = index_shard(str(path), slice_rows=slice_rows, require_caption=require_caption)
    sliced = [row for part in index.slices for row in read_slice(part, require_caption=require_caption)]
    samples = [row for row in rows if isinstance(row, Sample)]
    rejects = [row for row in rows if isinstance(row, Reject)]
    assert (sliced, list(index.rejects), index.num_samples) == (samples, rejects, len(samples))
    assert {reject.reason for reject in rejects} <= set(REJECT_REASONS)
    assert len({sample.key for sample in samples}) == len(samples)
    for row in rows:
        row.key.encode()  # what cannot be written as UTF-8 cannot be stored


@lru_cache
def pictures():
    """A small picture in every format and mode that Pillow writes together."""
    found = []
    for form in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        for mode in ("RGB", "L", "1", "P", "RGBA", "CMYK", "I;16"):
            with suppress(OSError, ValueError):
                found.append(encode(photo(20, 14).convert("L" if mode == "I;16" else mode).convert(mode), form))
    return found


@settings(max_examples=300, deadline=None)
@given(which=st.integers(0, 10_000), steps=changes)
def test_changed_pictures_give_pixels_or_a_reason(which, steps):
    assert len(pictures()) > 20
    data = mutated(pictures()[which % len(pictures())], steps)
    try:
        assert preprocess_image(data, PREPROCESSING, max_pixels=_LARGE).shape == (3, 64, 64)
    except ImageError as error:
        assert error.reason in IMAGE_ERROR_REASONS  # noqa: PT017 - both ends are legal
