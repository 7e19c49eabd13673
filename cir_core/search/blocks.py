"""A gallery of any form, checked and cut into tiles of bounded size."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cir_core.schema import CirError

if TYPE_CHECKING:
    from cir_core.search.device_tiles import DeviceTile

Block = Tensor | npt.NDArray[Any]

_TENSOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Products of two norms and a weight (at most 1e12 each) stay far below the float32 maximum of 3.4e38.
MAX_NORM = 1e12
MAX_DIM = 2**18  # norms in float32 are off by less than 1e-3 of themselves, and products by less than 4 % of the norms
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 2**14, 2**24  # smaller blocks are gathered, larger ones cut


@dataclass(frozen=True, eq=False, slots=True)
class PreparedGallery:
    """Gallery rows made ready to be scanned many times; `prepare_gallery` makes them.

    rows: as they were given, [N, D], for exact scores; may be a memory map. scanned: [N, D], the rows less `centre`
    (float32[D]), in the dtype that the processor multiplies fastest, on the same device. stats: float64 [tiles, 3], of every `tile_rows` rows
    the largest norm of what the cast lost, of the scanned rows, and of the rows.
    """

    rows: Block
    scanned: Tensor
    centre: Tensor
    stats: npt.NDArray[np.float64]
    tile_rows: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        """Where the rows are, and what is scanned."""
        return self.rows.device if isinstance(self.rows, Tensor) else torch.device("cpu")

    def tile(self, start: int, stop: int) -> tuple[Tensor, tuple[float, ...]]:
        """Return scanned rows start .. stop - 1 and their stats."""
        stats = self.stats[start // self.tile_rows : -(-stop // self.tile_rows)].max(0)
        return self.scanned[start:stop], tuple(float(value) for value in stats)


GalleryBlocks = (
    Block
    | PreparedGallery
    | Iterable[Block | PreparedGallery]
    | Iterable[tuple[int, Block]]
    | Iterable[tuple[int, PreparedGallery]]
)


@dataclass(frozen=True, eq=False, slots=True)
class RowBlock:
    """Gallery rows in memory, [n, D] of a floating dtype on the CPU, contiguous along D.

    indices: int64[n], gallery indices; None where row i has first_index + i. prepared: where `rows` are those of one.
    """

    rows: Block
    first_index: int
    indices: Tensor | None = None
    prepared: PreparedGallery | None = None


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
    check_block(queries, name, dim=None)
    rows = _to_float32(queries, None)
    bad = ~(torch.linalg.vector_norm(rows, dim=1) <= MAX_NORM)
    if bool(bad.any()):
        raise CirError(f"{name}: row {int(bad.int().argmax())} holds NaN, infinity or a norm above {MAX_NORM:g}")
    return rows


def iter_row_blocks(gallery_blocks: GalleryBlocks, dim: int, *, min_rows: int, max_rows: int) -> Iterator[RowBlock]:
    """Blocks of a gallery on the CPU as they are, without a copy; those below min_rows are gathered to so many first.

    Raises CirError as exact_top_k, but for values: whoever casts the rows checks them.
    """
    pending: list[tuple[int, Tensor]] = []
    num_rows = num_pending = 0
    for offset, block in numbered_blocks(gallery_blocks, dim):
        num_rows += len(block)
        if isinstance(block, PreparedGallery) and block.device.type != "cpu":
            block = block.rows
        if isinstance(block, PreparedGallery):
            yield RowBlock(block.rows, offset, prepared=block)
        elif len(block) >= min_rows:
            rows = _with_contiguous_rows(block)
            for start in range(0, len(rows), max_rows):
                yield RowBlock(rows[start : start + max_rows], offset + start)
        elif len(block):
            # A reader may refill its buffer for the next block, so rows that wait are copied.
            pending.append((offset, as_tensor(block).detach().to("cpu", copy=True)))
            num_pending += len(block)
            if num_pending >= min_rows:
                yield _gathered(pending)
                pending, num_pending = [], 0
    if pending:
        yield _gathered(pending)
    if num_rows == 0:
        raise CirError("the gallery has no rows: there is nothing to search")


def indices_of(piece: Tile | RowBlock | DeviceTile) -> Tensor:
    """Gallery indices int64[n] of the rows."""
    if piece.indices is not None:
        return piece.indices
    return _range(piece.first_index, len(piece.rows))


def _range(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count, device="cpu")  # torch's default device may be another


def _gathered(pending: list[tuple[int, Tensor]]) -> RowBlock:
    if len({rows.dtype for _, rows in pending}) > 1:
        pending = [(offset, rows.float()) for offset, rows in pending]
    indices = torch.cat([_range(offset, len(rows)) for offset, rows in pending])
    return RowBlock(torch.cat([rows for _, rows in pending]), 0, indices)


def _with_contiguous_rows(block: Block) -> Block:
    if isinstance(block, Tensor):
        block = block.detach().cpu()
        return block if block.stride(1) == 1 else block.contiguous()
    return block if block.strides[1] == block.itemsize and _strides_count_elements(block) else block.copy(order="C")


def _strides_count_elements(block: npt.NDArray[Any]) -> bool:
    """Whether rows are whole elements apart, forwards and aligned: a field of packed records is not."""
    return block.flags.aligned and all(stride >= 0 and stride % block.itemsize == 0 for stride in block.strides)


def not_finite(row: int) -> str:
    """Return what is said of a gallery row that cannot be searched."""
    return (
        f"gallery row {row} holds NaN, infinity or a norm above {MAX_NORM:g}: embeddings must be finite; "
        "embed that image again or leave it out"
    )


def iter_tiles(gallery_blocks: GalleryBlocks, dim: int, *, device: torch.device, max_rows: int) -> Iterator[Tile]:
    """Tiles of max_rows rows, the last may be smaller, whatever the size of the blocks; CirError as
    exact_top_k."""
    pending: list[tuple[int, Tensor]] = []
    num_pending = num_rows = 0
    for offset, given in numbered_blocks(gallery_blocks, dim):
        start, block = 0, given.rows if isinstance(given, PreparedGallery) else given
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
    indices = torch.cat([_range(offset, len(piece)) for offset, piece in pieces]).to(rows.device)
    norms = torch.linalg.vector_norm(rows, dim=1)
    max_norm = float(norms.max())
    if not max_norm <= MAX_NORM:
        bad = int(indices[(~(norms <= MAX_NORM)).int().argmax()])
        raise CirError(not_finite(bad))
    return Tile(rows, indices, max_norm)


def numbered_blocks(gallery_blocks: GalleryBlocks, dim: int) -> Iterator[tuple[int, Block | PreparedGallery]]:
    """Every block, checked, with the gallery index of its first row."""
    if isinstance(gallery_blocks, Tensor | np.ndarray | PreparedGallery):
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
        rows = block.rows if isinstance(block, PreparedGallery) else block
        check_block(rows, f"gallery block {number}", dim)
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


def check_block(block: object, name: str, dim: int | None) -> None:
    """Raise CirError for anything but rows [n, D] of a supported dtype; dim: the D to expect."""
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
    if block.shape[1] > MAX_DIM:
        raise CirError(f"{name} has {block.shape[1]} dimensions; the search takes at most {MAX_DIM}")


def _to_float32(block: Block, device: torch.device | None) -> Tensor:
    return as_tensor(block).detach().to(device=device, dtype=torch.float32)


def as_tensor(block: Block) -> Tensor:
    """Rows as a tensor where they are, copied only where torch cannot share the memory."""
    if isinstance(block, np.ndarray):
        # Arrow's zero-copy arrays are read-only, which torch.from_numpy warns about; it refuses odd strides.
        if not block.flags.writeable or not _strides_count_elements(block):
            block = block.copy(order="C")
        block = torch.from_numpy(block)
    return block
