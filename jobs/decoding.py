"""Decoding tasks, of shards' images and of single pictures. Apart, so that their processes start without torch and the models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray

from cir_core import files
from cir_core.benchmarks import Crop
from cir_core.preprocessing import ImageError, Preprocessing, preprocess_image
from cir_core.schema import AccessError, CirError, Reject
from cir_core.shards import Sample, fetch_image

DECODER_CPUS = 0.75  # so that on two cores both decode beside an encoder that waits for them
ENCODER_CPUS = 0.5  # an encoder waits for its GPU, or takes what the decoders leave
_DEATHS = 20  # of a decoding process, machines that go away included, before its rows are given up


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
def decode_images(rows: Sequence[Sample | Picture], preprocessing: Preprocessing) -> Decoded:
    """Decode rows, fetching pictures first. An image that cannot be used is a reject.

    Raises:
        AccessError, OSError: a store is closed to us or does not answer: that says nothing about a picture.
    """
    started, num_bytes = time.perf_counter(), 0
    images, readable, rejects = [], [], []
    for row in rows:
        place = files.redact(row.uri) if isinstance(row, Picture) else row.shard
        try:
            data = fetch_image(row.uri) if isinstance(row, Picture) else row.image
            num_bytes += len(data)
            cut = row.crop.cut if isinstance(row, Picture) and row.crop else None
            images.append(preprocess_image(data, preprocessing, cut=cut))
            readable.append(True)
        except ImageError as error:
            readable.append(False)
            rejects.append(Reject(place, row.key, error.reason, error.detail))
        except AccessError:
            raise
        except CirError as error:  # gone since it was listed, or not for us to read
            readable.append(False)
            rejects.append(Reject(place, row.key, "missing", str(error)))
    size = preprocessing.size
    stacked = np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
    return Decoded(stacked, readable, rejects, num_bytes, time.perf_counter() - started)


@ray.remote(num_cpus=DECODER_CPUS, max_retries=_DEATHS)
def fetch_images(uris: list[str], preprocessing: Preprocessing) -> list[np.ndarray[Any, Any] | tuple[str, str]]:
    """Return for each picture uint8[3, H, W], or the reason and detail why it cannot be used.

    Raises:
        AccessError, OSError: a store is closed to us or does not answer: that says nothing about a picture.
    """
    found: list[np.ndarray[Any, Any] | tuple[str, str]] = []
    for uri in uris:
        try:
            found.append(preprocess_image(fetch_image(uri), preprocessing))
        except ImageError as error:
            found.append((error.reason, f"{files.redact(uri)}: {error.detail}"))
        except AccessError:
            raise
        except CirError as error:
            found.append(("missing", str(error)))
    return found
