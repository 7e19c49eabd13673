"""A gallery made ready for many searches: cast once, where a search of plain blocks casts in every pass."""

from __future__ import annotations

import numpy as np
import torch

from cir_core.schema import CirError
from cir_core.search import kernels
from cir_core.search.blocks import Block, PreparedGallery, check_block, iter_row_blocks, iter_tiles
from cir_core.search.compiled_scan import cast_checked, mean_row, no_centre, tile_rows
from cir_core.search.device_tiles import has_fast_bfloat16, prepare_on_device
from cir_core.search.products import scan_dtype

_MAX_ROWS = 2**31 - 1  # the loops number the rows of a block in 32 bits


def prepare_gallery(rows: Block) -> PreparedGallery:
    """Make rows ready to be searched: pass the result where a gallery or one of its blocks is expected.

    rows: float16, bfloat16 or float32 [N, D], Tensor or ndarray, N >= 1, where they are to be searched: on the CPU, or on
    the queries' GPU. They are kept as they are, for exact scores, and read only where a candidate is: a memory map costs no
    memory. What is added, in the same place, is [N, D] in bfloat16, half of float32, where the processor multiplies that
    fast, and in float32 elsewhere; without the compiled loops, and on a GPU without bfloat16, nothing is.
    Raises CirError for NaN, infinity, other dtypes and shapes, and 2^31 rows and more.
    """
    check_block(rows, "gallery", None)
    if len(rows) > _MAX_ROWS:
        raise CirError(f"prepare_gallery takes at most {_MAX_ROWS} rows, not {len(rows)}: prepare parts of the gallery")
    device = rows.device if isinstance(rows, torch.Tensor) else torch.device("cpu")
    if isinstance(rows, torch.Tensor) and has_fast_bfloat16(device) and len(rows):
        return prepare_on_device(rows)
    if device.type != "cpu" or not kernels.is_compiled():
        return _checked_only(rows, device)
    (block,) = iter_row_blocks(rows, rows.shape[1], min_rows=1, max_rows=_MAX_ROWS)
    source, dtype, step = kernels.Rows(block.rows), scan_dtype(), tile_rows(rows.shape[1])
    centre = mean_row(block.rows) if dtype == torch.bfloat16 else no_centre(rows.shape[1])
    scanned = torch.empty(rows.shape, dtype=dtype, device="cpu")
    starts = range(0, len(rows), step)
    stats = [
        cast_checked(source, start, min(start + step, len(rows)), centre, scanned[start : start + step])
        for start in starts
    ]
    return PreparedGallery(block.rows, scanned, centre, np.array(stats), step)


def _checked_only(rows: Block, device: torch.device) -> PreparedGallery:
    """For the torch scan, which takes rows as they are: they are checked by being cut into its tiles."""
    for _ in iter_tiles(rows, rows.shape[1], device=device, max_rows=8192):
        pass
    nothing = torch.empty(0, rows.shape[1], device=device)
    return PreparedGallery(rows, nothing, no_centre(rows.shape[1]), np.empty((0, 3)), 1)
