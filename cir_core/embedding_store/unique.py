"""Ids are unique in a store: find those that occur in several parts. 8 bytes of memory per row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from cir_core.embedding_store.read import EmbeddingStore


def hash_ids(ids: pa.Array) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each id, the same in every process. Equal hashes may be a coincidence."""
    hashed: npt.NDArray[np.uint64] = pd.util.hash_array(ids.to_numpy(zero_copy_only=False), categorize=False)
    return hashed


def find_duplicates(store: EmbeddingStore, parts: Sequence[int] | None = None) -> dict[int, list[tuple[str, int]]]:
    """Return the rows whose id an earlier part has: by part, (id, the part that keeps it). Inside a part ids are unique."""
    hashes = [hash_ids(ids) for _, ids in store.iter_ids(parts)]
    everything = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
    suspects = np.unique(everything[1:][everything[1:] == everything[:-1]])
    found: dict[int, list[tuple[str, int]]] = {}
    if not suspects.size:
        return found
    kept: dict[str, int] = {}  # equal hashes may be a coincidence: compare these few ids themselves
    for part in store.parts if parts is None else [store.parts[index] for index in parts]:
        for _, ids in store.iter_ids([part.index]):
            for one in ids.filter(pa.array(np.isin(hash_ids(ids), suspects))).to_pylist():
                if one in kept:
                    found.setdefault(part.index, []).append((one, kept[one]))
                else:
                    kept[one] = part.index
    return found
