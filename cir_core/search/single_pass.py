"""One pass over a gallery for everything that is asked of it: the best of the whole, and of each query's own list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from cir_core.schema import CirError
from cir_core.search import kernels
from cir_core.search.blocks import (
    MAX_BLOCK_ROWS,
    MIN_BLOCK_ROWS,
    GalleryBlocks,
    RowBlock,
    Tile,
    iter_row_blocks,
    iter_tiles,
)
from cir_core.search.compiled_scan import CompiledScan
from cir_core.search.device_scan import DeviceScan
from cir_core.search.device_tiles import DeviceTile, has_fast_bfloat16, iter_device_tiles
from cir_core.search.queries import IndexLists, LinearQueries, padded_indices
from cir_core.search.scan import Scan, ieee_float32, rank_listed
from cir_core.search.top_k import BestLists, TopK


class Consumer(Protocol):
    """What takes in a gallery piece by piece."""

    def add(self, piece: Any) -> None:
        """Take in one piece: what the consumers' scan takes (RowBlock, DeviceTile or Tile), Tiles where there is no scan."""

    def results(self) -> list[TopK]:
        """Return one TopK a key."""


def gallery_scan(queries: LinearQueries, k: int, exclude: IndexLists | None) -> Consumer:
    """Return the scan for where the queries are: bfloat16 in matrix units, compiled loops, or float32 products in torch.

    exclude: as in exact_top_k.
    """
    excluded = None if exclude is None else padded_indices(exclude, queries.num_queries, "exclude", queries.device)
    if has_fast_bfloat16(queries.device):
        return DeviceScan(queries, k, excluded)
    compiled = kernels.is_compiled() and queries.device.type == "cpu"
    return CompiledScan(queries, k, excluded) if compiled else Scan(queries, k, excluded)


class SubsetRanking:
    """Ranks, for every query, the gallery indices of its own list. k: the longest list where None."""

    def __init__(self, queries: LinearQueries, subsets: IndexLists, k: int | None) -> None:
        self.queries = queries
        self.listed = padded_indices(subsets, queries.num_queries, "subsets", queries.device)
        self.best = BestLists(
            queries.num_keys * queries.num_queries, self.listed.shape[1] if k is None else k, queries.device
        )

    def add(self, piece: RowBlock | DeviceTile | Tile) -> None:
        """Score the listed rows of one piece."""
        rank_listed(self.queries, piece, self.listed, self.best)

    def results(self) -> list[TopK]:
        """Return one TopK a key."""
        return self.best.split(self.queries.num_keys)


def one_pass(queries: LinearQueries, gallery_blocks: GalleryBlocks, consumers: Sequence[Consumer]) -> None:
    """Show every row of the gallery to every consumer once."""
    pieces: Iterable[RowBlock | DeviceTile | Tile]
    device_scans = [one for one in consumers if isinstance(one, DeviceScan)]
    if device_scans:
        rows = min(one.tile_rows for one in device_scans)
        pieces = iter_device_tiles(gallery_blocks, queries.dim, device=queries.device, max_rows=rows)
    elif any(isinstance(one, CompiledScan) for one in consumers):  # it checks the values as it casts them
        pieces = iter_row_blocks(gallery_blocks, queries.dim, min_rows=MIN_BLOCK_ROWS, max_rows=MAX_BLOCK_ROWS)
    else:
        rows = min((one.tile_rows for one in consumers if isinstance(one, Scan)), default=8192)
        pieces = iter_tiles(gallery_blocks, queries.dim, device=queries.device, max_rows=rows)
    with ieee_float32(queries.device):
        for piece in pieces:
            for consumer in consumers:
                consumer.add(piece)


def checked_k(k: int) -> int:
    """Return k; CirError unless it is a whole number of at least 1."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise CirError(f"k must be a whole number of at least 1, got {k!r}")
    return k
