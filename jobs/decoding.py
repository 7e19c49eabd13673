"""Decoding tasks, of shards' images and of single pictures. Apart, so that their processes start without torch and the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import tenacity

from cir_core import files
from cir_core.benchmarks import Crop
from cir_core.preprocessing import MAX_BYTES, ImageError, Preprocessing, preprocess_image
from cir_core.schema import CirError, Reject
from cir_core.shards import Sample

DECODER_CPUS = 1.0  # decoding takes a core; fewer workers also means fewer imports


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that lies in a file of its own, read by the decoding task. key: its image id; crop: the part to embed."""

    key: str
    uri: str
    crop: Crop | None = None
    caption: str = ""


@ray.remote(num_cpus=DECODER_CPUS, max_retries=5)
def decode_images(
    rows: Sequence[Sample | Picture], preprocessing: Preprocessing
) -> tuple[np.ndarray[Any, Any], list[bool], list[Reject]]:
    """Return uint8[n, 3, H, W] of the readable images, which rows they are, and why the others are not."""
    images, readable, rejects = [], [], []
    for row in rows:
        try:
            if isinstance(row, Picture):
                cut = row.crop.cut if row.crop else None
                images.append(preprocess_image(fetch(row.uri), preprocessing, cut=cut))
            else:
                images.append(preprocess_image(row.image, preprocessing))
            readable.append(True)
        except ImageError as error:
            readable.append(False)
            place = files.redact(row.uri) if isinstance(row, Picture) else row.shard
            rejects.append(Reject(place, row.key, error.reason, error.detail))
        except CirError as error:  # gone since it was listed, or not for us to read
            readable.append(False)
            rejects.append(Reject("", row.key, "missing", str(error)))
    size = preprocessing.size
    stacked = np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
    return stacked, readable, rejects


@ray.remote(num_cpus=DECODER_CPUS, max_retries=5)
def fetch_images(uris: list[str], preprocessing: Preprocessing) -> list[np.ndarray[Any, Any] | tuple[str, str]]:
    """Return for each picture uint8[3, H, W], or the reason and detail why it cannot be used.

    Raises:
        OSError: a store or host does not answer: that says nothing about the picture.
    """
    found: list[np.ndarray[Any, Any] | tuple[str, str]] = []
    for uri in uris:
        try:
            found.append(preprocess_image(fetch(uri), preprocessing))
        except ImageError as error:
            found.append((error.reason, f"{files.redact(uri)}: {error.detail}"))
        except CirError as error:
            found.append(("missing", str(error)))
    return found


def fetch(uri: str) -> bytes:
    """Return a picture's bytes, cut where no picture may be larger; network failures are tried again.

    Raises:
        CirError: the picture is not there, or access is refused.
        OSError: the store does not answer.
    """
    # fsspec calls any failure of a web server, "come back later" too, a file that is not there
    firm = () if uri.startswith(("http://", "https://")) else (CirError,)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_not_exception_type(firm),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=10),
        stop=tenacity.stop_after_attempt(5),
        reraise=True,
    )
    return retrying(_read, uri)


def _read(uri: str) -> bytes:
    with files.open_stream(uri) as stream:
        return stream.read(MAX_BYTES + 1)
