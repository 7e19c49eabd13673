"""Gallery rows on the device that searches them, cast to bfloat16 for its matrix units, and prepared galleries there.

A plain tile is cast in one pass and its norms are taken in two more, about a third of the time of the product with 2048
queries; a prepared gallery costs nothing. Rows in host memory cross the bus once, as they are: float16 at half the bytes.
No step waits for the device but the check for rows that are not finite. Nothing here ran on CUDA so far: see
device_scan.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cir_core.schema import CirError
from cir_core.search.blocks import (
    MAX_NORM,
    Block,
    GalleryBlocks,
    PreparedGallery,
    as_tensor,
    not_finite,
    numbered_blocks,
)
from cir_core.search.queries import TINY

_UNIT = 2.0**-24
_LARGER = 1.001  # norms are summed in float32
_PREPARED_CELLS = 2**24  # elements that are cast at a time: temporaries of 64 MiB
_SAMPLE = 4096  # rows whose mean is the centre


@dataclass(frozen=True, eq=False, slots=True)
class DeviceTile:
    """n gallery rows on the searching device.

    rows: [n, D] of the dtype they came in. indices: int64[n], gallery indices. scanned: bfloat16 [n, D], the rows less
    `centre` (float32[D]). stats: of all rows the largest norm of what the cast lost, of the scanned rows, and of the rows,
    rounded up: numbers, or scalars on the device. norms: float32[n] of rows that nobody has checked, else None.
    """

    rows: Tensor
    indices: Tensor
    scanned: Tensor
    centre: Tensor
    stats: tuple[Tensor | float, ...]
    norms: Tensor | None = None

    def part(self, start: int, stop: int) -> DeviceTile:
        """Rows start .. stop - 1, without a copy; stats stay those of the whole."""
        rows, indices, scanned = self.rows[start:stop], self.indices[start:stop], self.scanned[start:stop]
        return DeviceTile(rows, indices, scanned, self.centre, self.stats)

    def check(self) -> None:
        """Raise CirError for NaN, infinity and norms above the largest; waits for the device."""
        if self.norms is None:
            return
        bad = ~(self.norms <= MAX_NORM)
        if bool(bad.any()):
            raise CirError(not_finite(int(self.indices[bad.int().argmax()])))


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in matrix units: CUDA from compute capability 8.0 (Ampere) on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def iter_device_tiles(
    gallery_blocks: GalleryBlocks, dim: int, *, device: torch.device, max_rows: int
) -> Iterator[DeviceTile]:
    """Tiles of at most max_rows rows on the device, small blocks together; CirError as exact_top_k, but for values.

    Rows in host memory cross the bus once, in the dtype they have.
    """
    pending: list[tuple[int, Tensor]] = []
    num_pending = num_rows = 0
    for offset, given in numbered_blocks(gallery_blocks, dim):
        num_rows += len(given)
        if isinstance(given, PreparedGallery) and _is_ready(given, device):
            yield from _prepared_tiles(given, offset, max_rows)
            continue
        start, block = 0, given.rows if isinstance(given, PreparedGallery) else given
        while start < len(block):
            stop = min(len(block), start + max_rows - num_pending)
            rows = _moved(block[start:stop], device)
            # A reader may refill its buffer for the next block, so rows that wait are copied.
            pending.append((offset + start, rows.clone() if stop - start < max_rows else rows))
            num_pending += stop - start
            if num_pending == max_rows:
                yield _tile(pending)
                pending, num_pending = [], 0
            start = stop
    if pending:
        yield _tile(pending)
    if num_rows == 0:
        raise CirError("the gallery has no rows: there is nothing to search")


def _is_ready(gallery: PreparedGallery, device: torch.device) -> bool:
    """Whether a gallery was prepared for this device."""
    prepared = gallery.scanned.dtype == torch.bfloat16 and len(gallery.scanned) == len(gallery)
    return prepared and gallery.device == device


def _prepared_tiles(gallery: PreparedGallery, offset: int, max_rows: int) -> Iterator[DeviceTile]:
    rows = as_tensor(gallery.rows)
    for start in range(0, len(rows), max_rows):
        stop = min(start + max_rows, len(rows))
        scanned, stats = gallery.tile(start, stop)
        yield DeviceTile(rows[start:stop], _range(offset + start, offset + stop, rows), scanned, gallery.centre, stats)


def _moved(block: Block, device: torch.device) -> Tensor:
    """Rows on the device. Those in pageable memory go through pinned memory, where the driver copies at the bus's speed.

    The copy need not be waited for: torch keeps a pinned buffer of its own until it is done.
    """
    rows = as_tensor(block).detach()
    if device.type == "cuda" and rows.device.type == "cpu" and not rows.is_pinned():
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)


def _range(start: int, stop: int, like: Tensor) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int64, device=like.device)


def _tile(pieces: list[tuple[int, Tensor]]) -> DeviceTile:
    rows = pieces[0][1] if len(pieces) == 1 else torch.cat([rows for _, rows in pieces])
    indices = torch.cat([_range(offset, offset + len(piece), piece) for offset, piece in pieces])
    centre = _centre(rows)
    scanned = _cast(rows, centre)
    norms = _norms(rows)
    kept = _norms(scanned).amax() * _LARGER + TINY
    # Rounding to 8 significant bits loses at most 2^-8 of what is kept; the float32 subtraction before it is inside 1.001.
    stats = (kept * (_LARGER * 2.0**-8) + TINY, kept, norms.amax() * _LARGER + TINY)
    return DeviceTile(rows, indices, scanned, centre, stats, norms)


def _centre(rows: Tensor) -> Tensor:
    """float32[D]: the mean of at most 4096 rows from all over; zero where it is not finite."""
    mean = rows[:: max(1, len(rows) // _SAMPLE)][:_SAMPLE].float().mean(0)
    return torch.where(mean.abs().amax() <= MAX_NORM, mean, torch.zeros_like(mean))


def _cast(rows: Tensor, centre: Tensor) -> Tensor:
    """bfloat16 [n, D]: float32 differences, rounded once; one kernel, without a float32 copy of the rows."""
    scanned = torch.empty(rows.shape, dtype=torch.bfloat16, device=rows.device)
    return torch.sub(rows, centre, out=scanned)


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return norms


def prepare_on_device(rows: Tensor) -> PreparedGallery:
    """Prepare a gallery for the device that its rows [N, D] are on; adds N x D bfloat16 there.

    What the cast lost is measured, less than half of what may be lost. Raises CirError for rows that are not finite.
    """
    rows = rows.detach()
    step = max(256, min(2**15, _PREPARED_CELLS // rows.shape[1]))
    centre = _centre(rows)
    scanned = torch.empty(rows.shape, dtype=torch.bfloat16, device=rows.device)
    found = []
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        less = some.float() - centre
        scanned[start : start + step] = less
        kept = scanned[start : start + step]
        found.append(torch.stack([_norms(part).amax() for part in (less - kept, kept, some)]))
    measured = torch.stack(found).double().cpu().numpy()
    for number in np.flatnonzero(~(measured[:, 2] <= MAX_NORM)):
        bad = ~(_norms(rows[number * step : (number + 1) * step]) <= MAX_NORM)
        raise CirError(not_finite(int(number) * step + int(bad.int().argmax())))
    stats = measured * _LARGER + TINY
    stats[:, 0] += 2 * _UNIT * (stats[:, 0] + stats[:, 1])  # the subtraction of the centre was rounded itself
    return PreparedGallery(rows, scanned, centre, stats, step)
