"""Rows that the scan on a device could not rule out, gathered until there are enough to score them by the definition.

Scoring and merging are dozens of small steps, some of which wait for the device: once in many tiles instead of in each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cir_core.search.device_tiles import DeviceTile
from cir_core.search.queries import LinearQueries
from cir_core.search.top_k import BestLists, pair_dots

_MIN_ENTRIES, _MAX_ENTRIES = 2**14, 2**22  # (list, row) that wait
_CELLS = 2**24  # comparisons with excluded indices at a time


class Candidates:
    """Waiting (query, row) pairs, each for one or several keys, and the lists they are offered to.

    excluded: int64[Q, m] gallery indices, -1 for none. memory: bytes that waiting rows may take, or nearly so.
    """

    def __init__(self, queries: LinearQueries, best: BestLists, excluded: Tensor | None, *, memory: int) -> None:
        self.queries, self.best, self.excluded = queries, best, excluded
        self.max_pairs = max(1024, memory // (4 * queries.dim))
        self.max_entries = min(max(len(best.scores) * best.k // 2, _MIN_ENTRIES), _MAX_ENTRIES)
        self.num_exact = 0  # pairs scored so far
        self._clear()

    def _clear(self) -> None:
        self.rows: list[Tensor] = []
        self.query: list[Tensor] = []
        self.index: list[Tensor] = []
        self.key: list[Tensor] = []
        self.pair: list[Tensor] = []  # number of the pair that an entry of `key` belongs to
        self.num_pairs = self.num_entries = 0

    def add(self, tile: DeviceTile, query: Tensor, column: Tensor, keys: Tensor) -> None:
        """Take P pairs; keys: bool[K, P], the weightings that each is wanted for. The tile's rows are copied."""
        index = tile.indices[column]
        if self.excluded is not None:
            keep = torch.nonzero(~_is_listed(self.excluded, query, index))[:, 0]  # one wait; four, were it a mask below
            query, column, index, keys = query[keep], column[keep], index[keep], keys[:, keep]
        for start in range(0, len(query), self.max_pairs):
            pairs = slice(start, start + self.max_pairs)
            if len(keys) == 1:  # wanted for it, or it were not here
                pair = torch.arange(len(query[pairs]), device=query.device)
                key = torch.zeros_like(pair)
            else:
                key, pair = torch.nonzero(keys[:, pairs], as_tuple=True)
            self.rows.append(tile.rows[column[pairs]])
            self.query.append(query[pairs])
            self.index.append(index[pairs])
            self.key.append(key)
            self.pair.append(pair + self.num_pairs)
            self.num_pairs += len(query[pairs])
            self.num_entries += len(key)
            self.settle(wait=True)

    def settle(self, *, wait: bool) -> None:
        """Score what waits and offer it; wait: only where there is enough of it."""
        enough = self.num_pairs >= self.max_pairs or self.num_entries >= self.max_entries
        if self.num_pairs == 0 or (wait and not enough):
            return
        rows, query, index = torch.cat(self.rows), torch.cat(self.query), torch.cat(self.index)
        key, pair = torch.cat(self.key), torch.cat(self.pair)
        self.num_exact += self.num_pairs
        self._clear()
        numbers = torch.arange(len(query), device=query.device)
        dots = [pair_dots(part, rows, query, numbers)[pair] for part in self.queries.parts]
        scores = self.queries.exact_scores(key, query[pair], dots)
        lists = key * self.queries.num_queries + query[pair]
        order = lists.argsort(stable=True)
        self.best.offer(lists[order], scores[order], index[pair][order])


def _is_listed(excluded: Tensor, query: Tensor, index: Tensor) -> Tensor:
    """bool[P]: whether index[p] is in excluded[query[p]]."""
    listed = torch.zeros(len(query), dtype=torch.bool, device=query.device)
    step = max(1, _CELLS // excluded.shape[1])
    for pairs in (slice(start, start + step) for start in range(0, len(query), step)):
        listed[pairs] = (excluded[query[pairs]] == index[pairs, None]).any(1)
    return listed
