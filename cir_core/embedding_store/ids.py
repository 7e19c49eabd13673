"""The ids of a store, or of a share of it, held in memory: who asks again and again does not read them again and again."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cir_core.embedding_store.read import EmbeddingStore
from cir_core.embedding_store.unique import hash_ids

_READERS = 32  # parts whose ids are read at once


class IdIndex:
    """The ids of some parts, by row and by id. Rows are the store's, int64.

    A row takes 24 bytes and its id's own: an offset, a hash, a place in the order of the hashes.
    parts: their numbers, None for all. Raises CirError for a part that does not exist or cannot be read.
    """

    def __init__(self, store: EmbeddingStore, parts: Sequence[int] | None = None) -> None:
        chosen = sorted(set(parts)) if parts is not None else [part.index for part in store.parts]

        def read(index: int) -> list[tuple[int, pa.Array]]:
            return list(store.iter_ids([index]))

        with ThreadPoolExecutor(_READERS) as pool:
            blocks = [block for found in pool.map(read, chosen) for block in found]
        self._rows = np.array([offset for offset, _ in blocks], np.int64)  # of each block's first id, rising
        lengths = [len(ids) for _, ids in blocks]
        self._places = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        hashes = np.concatenate([np.empty(0, np.uint64), *(hash_ids(ids) for _, ids in blocks)])
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._ids = pa.chunked_array([ids for _, ids in blocks], pa.string()).cast(pa.large_string()).combine_chunks()

    def rows_of(self, ids: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Return those of the ids that are here, each once, and their rows [n], rising."""
        wanted = pa.array(list(dict.fromkeys(ids)), pa.string())
        hashes = hash_ids(wanted)
        first, end = (np.searchsorted(self._hashes, hashes, side) for side in ("left", "right"))
        counts = end - first  # more than one where hashes agree by chance
        asked = np.repeat(np.arange(len(wanted)), counts)
        nth = np.arange(len(asked)) - np.repeat(np.cumsum(counts) - counts, counts)
        places = self._order[first[asked] + nth]
        names = self._ids.take(pa.array(places)).to_pylist()
        same = [
            place for place, (name, one) in enumerate(zip(names, asked, strict=True)) if name == wanted[one].as_py()
        ]
        same.sort(key=lambda place: int(places[place]))
        held = places[same]
        block = np.searchsorted(self._places, held, "right") - 1
        return [names[place] for place in same], self._rows[block] + held - self._places[block]

    def ids_of(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.bool_], pa.Array]:
        """Return which of the rows [n] are here, bool[n], and the ids of those, in the order of the rows."""
        if not len(self._rows):
            return np.zeros(len(rows), np.bool_), pa.array([], pa.large_string())
        block = np.searchsorted(self._rows, rows, "right") - 1
        places = self._places[block] + rows - self._rows[block]
        here = (block >= 0) & (places < self._places[block + 1])
        return here, self._ids.take(pa.array(places[here]))
