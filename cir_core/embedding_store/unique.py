"""Ids are unique in a store: find those that occur in several parts. 8 bytes of memory per row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def part_hashes(store: EmbeddingStore, index: int) -> npt.NDArray[np.uint64]:
    """Return the hashes of a part's ids, in row order."""
    return np.concatenate([np.empty(0, np.uint64), *(hash_ids(ids) for _, ids in store.iter_ids([index]))])


def repeated(hashes: Sequence[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    """Return the values that occur more than once in all arrays together, rising."""
    everything = np.sort(np.concatenate([np.empty(0, np.uint64), *hashes]))
    return np.unique(everything[1:][everything[1:] == everything[:-1]])


def ids_with(store: EmbeddingStore, index: int, suspects: npt.NDArray[np.uint64]) -> list[str]:
    """Return the ids of a part whose hash is one of `suspects`, in row order."""
    return [
        one
        for _, ids in store.iter_ids([index])
        for one in ids.filter(pa.array(np.isin(hash_ids(ids), suspects))).to_pylist()
    ]


def later_ones(suspected: Iterable[tuple[int, Sequence[str]]]) -> dict[int, list[tuple[str, int]]]:
    """Return the rows whose id an earlier part has: by part, (id, the part that keeps it). suspected: parts in order."""
    found: dict[int, list[tuple[str, int]]] = {}
    kept: dict[str, int] = {}  # equal hashes may be a coincidence: these few ids are compared themselves
    for index, ids in suspected:
        for one in ids:
            if kept.setdefault(one, index) != index:
                found.setdefault(index, []).append((one, kept[one]))
    return found


def find_duplicates(store: EmbeddingStore, parts: Sequence[int] | None = None) -> dict[int, list[tuple[str, int]]]:
    """Return what `later_ones` does, of a store or some of its parts. Inside a part ids are unique."""
    indices = [part.index for part in store.parts] if parts is None else list(parts)
    with ThreadPoolExecutor(_READERS) as pool:
        hashes = list(pool.map(lambda index: part_hashes(store, index), indices))
    suspects = repeated(hashes)
    return later_ones(
        (index, ids_with(store, index, suspects))
        for index, own in zip(indices, hashes, strict=True)
        if np.isin(own, suspects).any()
    )
