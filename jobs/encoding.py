"""Encoder calls whose results do not depend on how many CPUs a node has. Apart, for actors of both towers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

PIECE_ROWS = 16  # a whole number of them should fill the CPUs; fewer rows slow the matrix products down


class EncoderCalls:
    """Makes an encoder's calls, from any thread.

    On a GPU one at a time. On CPUs in pieces of `PIECE_ROWS`, each on one thread: a product that is cut for two threads is
    not rounded as one that is cut for eight, so an actor that is started again on a smaller node would give other bits.
    """

    def __init__(self, *, use_gpu: bool, threads: int) -> None:
        self._lock, self._pool = threading.Lock(), None
        if not use_gpu:
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(threads)

    def __call__(self, encode: Callable[[Any], torch.Tensor], rows: Any) -> npt.NDArray[np.float32]:
        """Return encode(rows) [B, D] for a tensor or list of B >= 1 rows."""
        if self._pool is None:
            with self._lock:
                return encode(rows).cpu().numpy()
        pieces = [rows[start : start + PIECE_ROWS] for start in range(0, len(rows), PIECE_ROWS)]
        return np.concatenate([one.numpy() for one in self._pool.map(encode, pieces)])
