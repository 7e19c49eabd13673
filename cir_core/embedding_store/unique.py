"""Ids are unique in a store: find those that occur in several parts. 8 bytes of memory per row."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from cir_core.embedding_store.read import EmbeddingStore

_READERS = 32  # parts whose ids are read at once


def hash_ids(ids: pa.Array) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each id, the same in every process. Equal hashes may be a coincidence."""
    hashed: npt.NDArray[np.uint64] = pd.util.hash_array(ids.to_numpy(zero_copy_only=False), categorize=False)
    return hashed


def find_duplicates(store: EmbeddingStore, parts: Sequence[int] | None = None) -> dict[int, list[tuple[str, int]]]:
    """Return the rows whose id an earlier part has: by part, (id, the part that keeps it). Inside a part ids are unique."""
    indices = [part.index for part in store.parts] if parts is None else list(parts)

    def hashes_of(index: int) -> npt.NDArray[np.uint64]:
        return np.concatenate([np.empty(0, np.uint64), *(hash_ids(ids) for _, ids in store.iter_ids([index]))])

    with ThreadPoolExecutor(_READERS) as pool:
        hashes = list(pool.map(hashes_of, indices))
    everything = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
    suspects = np.unique(everything[1:][everything[1:] == everything[:-1]])
    found: dict[int, list[tuple[str, int]]] = {}
    kept: dict[str, int] = {}  # equal hashes may be a coincidence: compare these few ids themselves
    for index, own in zip(indices, hashes, strict=True):
        for _, ids in store.iter_ids([index]) if np.isin(own, suspects).any() else ():
            for one in ids.filter(pa.array(np.isin(hash_ids(ids), suspects))).to_pylist():
                if one in kept:
                    found.setdefault(index, []).append((one, kept[one]))
                else:
                    kept[one] = index
    return found
