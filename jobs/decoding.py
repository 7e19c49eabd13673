"""Decoding tasks, of shards' images and of single pictures. Apart, so that their processes start without torch and the models."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import WorkerCrashedError

from cir_core import files
from cir_core.benchmarks import Crop
from cir_core.preprocessing import ImageError, Preprocessing, preprocess_image
from cir_core.schema import AccessError, CirError, Reject
from cir_core.shards import Sample, fetch_image

DECODER_CPUS = 0.75  # so that on two cores both decode beside an encoder that waits for them
ENCODER_CPUS = 0.5  # an encoder waits for its GPU, or takes what the decoders leave
_DEATHS = 20  # of a decoding process, machines that go away included, before its rows are decoded one by one
_DEATHS_ALONE = 3  # with one row to decode, before the row is given up


def embedding_resources(num_encoders: int, *, use_gpu: bool) -> dict[str, float]:
    """Return what `num_encoders` encoders and one decoder need at least, for `session.check_resources`."""
    gpus = {"GPU": float(num_encoders)} if use_gpu else {}
    return {"CPU": ENCODER_CPUS * num_encoders + DECODER_CPUS} | gpus


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that lies in a file of its own, read by the decoding task. key: its image id; crop: the part to embed."""

    key: str
    uri: str
    crop: Crop | None = None
    caption: str = ""


Row = Sample | Picture


class Decoded(NamedTuple):
    """images: uint8[n, 3, H, W] of the n readable rows; readable: which rows these are; why the others are not.

    num_bytes: encoded; seconds: that the task was busy.
    """

    images: np.ndarray[Any, Any]
    readable: list[bool]
    rejects: list[Reject]
    num_bytes: int
    seconds: float


@ray.remote(num_cpus=DECODER_CPUS, max_retries=_DEATHS)
def decode_images(rows: Sequence[Row], preprocessing: Preprocessing) -> Decoded:
    """Decode rows, fetching pictures first. An image that cannot be used is a reject.

    Raises:
        AccessError, OSError: a store is closed to us or does not answer: that says nothing about a picture.
    """
    started, num_bytes = time.perf_counter(), 0
    images, readable, rejects = [], [], []
    for row in rows:
        try:
            data = fetch_image(row.uri) if isinstance(row, Picture) else row.image
            num_bytes += len(data)
            cut = row.crop.cut if isinstance(row, Picture) and row.crop else None
            images.append(preprocess_image(data, preprocessing, cut=cut))
            readable.append(True)
        except ImageError as error:
            readable.append(False)
            rejects.append(Reject(_place(row), row.key, error.reason, error.detail))
        except AccessError:
            raise
        except CirError as error:  # gone since it was listed, or not for us to read
            readable.append(False)
            rejects.append(Reject(_place(row), row.key, "missing", str(error).removeprefix(f"{_place(row)}: ")))
    return Decoded(_stacked(images, preprocessing), readable, rejects, num_bytes, time.perf_counter() - started)


def get_decoded(rows: Sequence[Row], pending: ray.ObjectRef[Decoded], preprocessing: Preprocessing) -> Decoded:
    """Wait for what decode_images makes of `rows`. Where its processes die of it, rows are decoded one by one.

    A row that its processes die of even so, as by a fault of a decoding library, is a reject. Raises: as decode_images.
    """
    try:
        decoded: Decoded = ray.get(pending)
        return decoded
    except WorkerCrashedError:
        if len(rows) == 1:
            detail = f"processes died of it, {_DEATHS_ALONE + 1} of them with nothing else to decode"
            reject = Reject(_place(rows[0]), rows[0].key, "decoder_crash", detail)
            return Decoded(_stacked([], preprocessing), [False], [reject], 0, 0.0)
    alone = decode_images.options(max_retries=_DEATHS_ALONE)
    found = [get_decoded([row], alone.remote([row], preprocessing), preprocessing) for row in rows]
    return Decoded(
        np.concatenate([one.images for one in found]),
        [readable for one in found for readable in one.readable],
        [reject for one in found for reject in one.rejects],
        sum(one.num_bytes for one in found),
        sum(one.seconds for one in found),
    )


def decoded_ahead(
    chunks: Iterable[Sequence[Row]], preprocessing: Preprocessing, limit: int
) -> Iterator[tuple[Sequence[Row], Decoded]]:
    """Yield each chunk of rows with what it decodes to, in order, while at most `limit` tasks are started and not yielded."""
    waiting: deque[tuple[Sequence[Row], Any]] = deque()
    for chunk in chunks:
        if len(waiting) == limit:
            rows, pending = waiting.popleft()
            yield rows, get_decoded(rows, pending, preprocessing)
        waiting.append((chunk, decode_images.remote(chunk, preprocessing)))
    for rows, pending in waiting:
        yield rows, get_decoded(rows, pending, preprocessing)


def _place(row: Row) -> str:
    return files.redact(row.uri) if isinstance(row, Picture) else row.shard


def _stacked(images: Sequence[np.ndarray[Any, Any]], preprocessing: Preprocessing) -> np.ndarray[Any, Any]:
    size = preprocessing.size
    return np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
