"""A gallery of any form, checked and cut into tiles of bounded size."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cir_core.schema import CirError

Block = Tensor | npt.NDArray[Any]
GalleryBlocks = Block | Iterable[Block] | Iterable[tuple[int, Block]]

_TENSOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Products of two norms and a weight (at most 1e12 each) stay far below the float32 maximum of 3.4e38.
MAX_NORM = 1e12


@dataclass(frozen=True, slots=True)
class Tile:
    """Gallery rows float32 [n, D] on the searching device, their gallery indices int64[n], their largest
    norm."""

    rows: Tensor
    indices: Tensor
    max_norm: float


def as_query_rows(queries: Block, name: str) -> Tensor:
    """Queries as a float32 [Q, D] tensor, detached, where they are; CirError for NaN, infinity, anything
    else."""
    _check_block(queries, name, dim=None)
    rows = _to_float32(queries, None)
    bad = ~(torch.linalg.vector_norm(rows, dim=1) <= MAX_NORM)
    if bool(bad.any()):
        raise CirError(f"{name}: row {int(bad.int().argmax())} holds NaN, infinity or a norm above {MAX_NORM:g}")
    return rows


def iter_tiles(gallery_blocks: GalleryBlocks, dim: int, *, device: torch.device, max_rows: int) -> Iterator[Tile]:
    """Tiles of max_rows rows, the last may be smaller, whatever the size of the blocks; CirError as
    exact_top_k."""
    pending: list[tuple[int, Tensor]] = []
    num_pending = num_rows = 0
    for offset, block in _numbered(gallery_blocks, dim):
        start = 0
        while start < len(block):
            stop = min(len(block), start + max_rows - num_pending)
            rows = _to_float32(block[start:stop], device)
            # A reader may refill its buffer for the next block, so rows that wait are copied.
            pending.append((offset + start, rows.clone() if stop - start < max_rows else rows))
            num_pending += stop - start
            if num_pending == max_rows:
                yield _tile(pending)
                pending, num_pending = [], 0
            num_rows += stop - start
            start = stop
    if pending:
        yield _tile(pending)
    if num_rows == 0:
        raise CirError("the gallery has no rows: there is nothing to search")


def _tile(pieces: list[tuple[int, Tensor]]) -> Tile:
    rows = pieces[0][1] if len(pieces) == 1 else torch.cat([rows for _, rows in pieces])
    indices = torch.cat([torch.arange(offset, offset + len(piece)) for offset, piece in pieces]).to(rows.device)
    norms = torch.linalg.vector_norm(rows, dim=1)
    max_norm = float(norms.max())
    if not max_norm <= MAX_NORM:
        bad = int(indices[(~(norms <= MAX_NORM)).int().argmax()])
        raise CirError(
            f"gallery row {bad} holds NaN, infinity or a norm above {MAX_NORM:g}: embeddings must be finite; "
            "embed that image again or leave it out"
        )
    return Tile(rows, indices, max_norm)


def _numbered(gallery_blocks: GalleryBlocks, dim: int) -> Iterator[tuple[int, Block]]:
    """Every block, checked, with the gallery index of its first row."""
    if isinstance(gallery_blocks, Tensor | np.ndarray):
        gallery_blocks = [gallery_blocks]
    spans: list[tuple[int, int]] = []
    with_offsets: bool | None = None
    next_row = 0
    for number, item in enumerate(gallery_blocks):
        paired = isinstance(item, tuple)
        if with_offsets not in (None, paired):
            raise CirError(f"gallery block {number}: give an offset with every block or with none")
        with_offsets = paired
        offset, block = item if isinstance(item, tuple) else (next_row, item)
        _check_block(block, f"gallery block {number}", dim)
        if paired and len(block):
            _claim(spans, int(offset), int(offset) + len(block))
        yield int(offset), block
        next_row += len(block)


def _claim(spans: list[tuple[int, int]], start: int, stop: int) -> None:
    """Add [start, stop) to the sorted spans; CirError where a row would be searched twice."""
    if start < 0:
        raise CirError(f"gallery block offset {start} is negative")
    at = bisect.bisect(spans, (start, stop))
    for other in spans[max(at - 1, 0) : at + 1]:
        if start < other[1] and other[0] < stop:
            raise CirError(f"gallery rows {start}..{stop - 1} overlap rows {other[0]}..{other[1] - 1} of another block")
    spans.insert(at, (start, stop))


def _check_block(block: object, name: str, dim: int | None) -> None:
    if isinstance(block, Tensor):
        right_dtype = block.dtype in _TENSOR_DTYPES
    elif isinstance(block, np.ndarray):
        right_dtype = block.dtype in (np.float16, np.float32)
    else:
        raise CirError(f"{name} must be a torch Tensor or a numpy array, not {type(block).__name__}")
    if not right_dtype:
        raise CirError(f"{name} must be float16, bfloat16 or float32 in native byte order, not {block.dtype}")
    if block.ndim != 2 or block.shape[1] == 0 or (dim is not None and block.shape[1] != dim):
        expected = "[rows, D]" if dim is None else f"[rows, {dim}] like the queries"
        raise CirError(f"{name} must have shape {expected}, not {list(block.shape)}")


def _to_float32(block: Block, device: torch.device | None) -> Tensor:
    if isinstance(block, np.ndarray):
        # Arrow's zero-copy arrays are read-only, which torch.from_numpy warns about; it refuses negative
        # strides.
        if not block.flags.writeable or min(block.strides) < 0:
            block = block.copy()
        block = torch.from_numpy(block)
    return block.detach().to(device=device, dtype=torch.float32)
