"""Decoding tasks for embedding. Apart, so that the processes that run them start without torch and the models."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from cir_core.preprocessing import ImageError, Preprocessing, preprocess_image
from cir_core.schema import Reject
from cir_core.shards import Sample

DECODER_CPUS = 1.0  # decoding takes a core; fewer workers also means fewer imports


@ray.remote(num_cpus=DECODER_CPUS, max_retries=5)
def decode_images(
    rows: list[Sample], preprocessing: Preprocessing
) -> tuple[np.ndarray[Any, Any], list[bool], list[Reject]]:
    """Return uint8[n, 3, H, W] of the readable images, which rows they are, and why the others are not."""
    images, readable, rejects = [], [], []
    for row in rows:
        try:
            images.append(preprocess_image(row.image, preprocessing))
            readable.append(True)
        except ImageError as error:
            readable.append(False)
            rejects.append(Reject(row.shard, row.key, error.reason, error.detail))
    size = preprocessing.size
    stacked = np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
    return stacked, readable, rejects
