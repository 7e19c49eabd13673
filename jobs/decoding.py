"""Decoding tasks for embedding. Apart, so that the processes that run them start without torch and the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from cir_core import files
from cir_core.benchmarks import Crop
from cir_core.preprocessing import ImageError, Preprocessing, preprocess_image
from cir_core.schema import Reject
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
                images.append(preprocess_image(files.read_bytes(row.uri), preprocessing, cut=cut))
            else:
                images.append(preprocess_image(row.image, preprocessing))
            readable.append(True)
        except ImageError as error:
            readable.append(False)
            place = files.redact(row.uri) if isinstance(row, Picture) else row.shard
            rejects.append(Reject(place, row.key, error.reason, error.detail))
    size = preprocessing.size
    stacked = np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
    return stacked, readable, rejects
