"""A gallery made ready for many searches: cast once, where a search of plain blocks casts in every pass."""

from __future__ import annotations

import numpy as np
import torch

from cir_core.schema import CirError
from cir_core.search import kernels
from cir_core.search.blocks import Block, PreparedGallery, check_block, iter_row_blocks, iter_tiles
from cir_core.search.compiled_scan import cast_checked, mean_row, no_centre, scan_dtype, tile_rows

_MAX_ROWS = 2**31 - 1  # the loops number the rows of a block in 32 bits


def prepare_gallery(rows: Block) -> PreparedGallery:
    """Make rows ready to be searched: pass the result where a gallery or one of its blocks is expected.

    rows: float16, bfloat16 or float32 [N, D], Tensor on the CPU or ndarray, N >= 1. They are kept as they are, for exact
    scores, and read only where a candidate is: a memory map costs no memory. What is added is [N, D] in bfloat16, half of
    float32, where the processor multiplies that fast, and in float32 elsewhere; without the compiled loops nothing is.
    Raises CirError for NaN, infinity, other dtypes and shapes, 2^31 rows and more, and rows on a GPU.
    """
    check_block(rows, "gallery", None)
    if isinstance(rows, torch.Tensor) and rows.device.type != "cpu":
        raise CirError("prepare_gallery takes rows on the CPU; on a GPU plain blocks are searched as they are")
    if len(rows) > _MAX_ROWS:
        raise CirError(f"prepare_gallery takes at most {_MAX_ROWS} rows, not {len(rows)}: prepare parts of the gallery")
    (block,) = iter_row_blocks(rows, rows.shape[1], min_rows=1, max_rows=_MAX_ROWS)
    if (
        not kernels.is_compiled()
    ):  # the torch scan takes rows as they are, and they are checked by being cut into its tiles
        for _ in iter_tiles(rows, rows.shape[1], device=torch.device("cpu"), max_rows=8192):
            pass
        nothing = torch.empty(0, rows.shape[1], device="cpu")
        return PreparedGallery(block.rows, nothing, no_centre(rows.shape[1]), np.empty((0, 3)), 1)
    source, dtype, step = kernels.Rows(block.rows), scan_dtype(), tile_rows(rows.shape[1])
    centre = mean_row(block.rows) if dtype == torch.bfloat16 else no_centre(rows.shape[1])
    scanned = torch.empty(rows.shape, dtype=dtype, device="cpu")
    starts = range(0, len(rows), step)
    stats = [
        cast_checked(source, start, min(start + step, len(rows)), centre, scanned[start : start + step])
        for start in starts
    ]
    return PreparedGallery(block.rows, scanned, centre, np.array(stats), step)
