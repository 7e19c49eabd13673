"""The compiled inner loops of the search (kernels.c and its headers), called through ctypes, which lets other threads run meanwhile.

torch is imported before they are loaded: they share its OpenMP library and so its threads.

They are built when the package is installed, where there is a C compiler. Without them the same search runs in torch
(scan.py): same results to the bit, more time. On a GPU it does anyway (device_scan.py).
"""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cir_core.schema import CirError

try:
    from cir_core.search import _kernels  # type: ignore[attr-defined]
except ImportError:  # no compiler where this was installed
    _library = None
else:
    _library = ctypes.CDLL(str(_kernels.__file__))

_NO_MEMORY = -2
_logger = logging.getLogger("cir_core.search")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_Array = npt.NDArray[Any]


def is_compiled() -> bool:
    """Whether the compiled loops are there, and of this version; where not, that is logged once."""
    return _usable() is not None


@lru_cache(maxsize=1)
def _usable() -> ctypes.CDLL | None:
    if _library is None:
        _logger.warning("searching without the compiled loops, several times slower: install again with a C compiler")
        return None
    ours = [ctypes.sizeof(structure) for structure in (_Batch, _Block, _Tile)]
    try:
        _library.structure_sizes.restype = ctypes.c_int64
        theirs = _library.structure_sizes()
    except AttributeError:
        theirs = -1
    if theirs != ours[0] * 1_000_000 + ours[1] * 1_000 + ours[2]:
        _logger.warning(
            "the compiled loops of the search are of another version and not used: install again (make install)"
        )
        return None
    return _library


class _Block(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("stride", ctypes.c_int64),
        ("first_index", ctypes.c_int64),
        ("indices", ctypes.c_void_p),
    )


_SIZES = ("num_queries", "num_keys", "num_products", "num_parts", "k", "capacity", "dim", "lanes")
_LANES = 16  # keys that the scan works on at a time
_ARRAYS = (
    *("bar", "slack", "slack_max", "need", "corners", "count", "limit", "value", "row"),
    *("best_score", "best_index", "num_exact"),
)
_CORNERS = 8  # that two products are held against


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("rho", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("scan_weights", "slack_terms", "queries", "weights", "offsets")),
        ("excluded", ctypes.c_void_p),
        ("num_excluded", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
    )


class _Tile(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_void_p),
        ("block", ctypes.c_void_p),
        ("products", ctypes.c_void_p),
        ("ld", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("stats", ctypes.c_float * 3),
    )


class Rows:
    """Gallery rows as the loops read them: [n, D] of a supported dtype, on the CPU, any row stride.

    indices: int64[n], the rows' gallery indices; None where row i has index first_index + i.
    """

    def __init__(self, rows: Tensor | _Array, first_index: int = 0, indices: Tensor | None = None) -> None:
        self.kept = (rows, indices)  # the memory that the pointers below lead into
        self.num_rows, self.dim = int(rows.shape[0]), int(rows.shape[1])
        if isinstance(rows, Tensor):
            dtype, pointer, strides = rows.dtype, rows.data_ptr(), rows.stride()
        else:
            dtype = {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16}[rows.dtype]
            pointer = rows.ctypes.data
            strides = tuple(stride // rows.itemsize for stride in rows.strides)
        if self.dim > 1 and strides[1] != 1:
            raise ValueError("rows must be contiguous along D")
        self.c = _Block(pointer, _DTYPES[dtype], strides[0], first_index, None)
        if indices is not None:
            self.c.indices = indices.data_ptr()


class Batch:
    """The lists of a batch of queries, and what is known of their bounds; see kernels.h for every array."""

    def __init__(self, *, k: int, capacity: int, group: int, rho: float, arrays: dict[str, _Array]) -> None:
        num_queries, num_products, num_keys = arrays["scan_weights"].shape
        num_parts, _, dim = arrays["queries"].shape
        lanes = -(-num_keys // _LANES) * _LANES
        self.num_queries, self.group = num_queries, group
        scan_weights = np.zeros((num_queries, num_products, lanes), np.float32)
        scan_weights[:, :, :num_keys] = arrays["scan_weights"]
        self.arrays = arrays | {
            "scan_weights": scan_weights,
            "slack": np.zeros((num_queries, num_keys), np.float32),
            "slack_max": np.zeros((num_queries, num_keys), np.float32),
            "need": np.full((num_queries, lanes), np.inf, np.float32),
            "count": np.zeros(num_queries, np.int32),
            "limit": np.full(num_queries, min(2 * k, capacity), np.int32),
            "value": np.empty((num_queries, num_products, capacity), np.float32),
            "row": np.empty((num_queries, capacity), np.int32),
            "num_exact": np.zeros(num_queries, np.int64),
        }
        if max(num_products, num_keys) == 1 or (num_products == 2 and not (scan_weights < 0).any()):
            self.arrays["corners"] = np.empty((num_queries, num_products, _CORNERS), np.float32)
        sizes = (num_queries, num_keys, num_products, num_parts, k, capacity, dim, lanes)
        self.c = _Batch(**dict(zip(_SIZES, sizes, strict=True)), rho=rho)
        for name, array in self.arrays.items():
            if not array.flags.c_contiguous:
                raise ValueError(f"{name} must be contiguous")
            setattr(self.c, name, array.ctypes.data)
        self.c.num_excluded = arrays["excluded"].shape[1] if "excluded" in arrays else 0


def _threads(count: int) -> ctypes.c_int32:
    return ctypes.c_int32(max(1, min(torch.get_num_threads(), count)))


def _checked(failed: int) -> None:
    if failed:
        raise CirError("the search ran out of memory: search fewer queries or weightings at a time, or a smaller k")


def scan_tile(batch: Batch, rows: Rows, products: list[Tensor], *, first_row: int, stats: tuple[float, ...]) -> None:
    """Take in the scan of rows first_row .. first_row + n - 1 of a block.

    products: one [n, Q] a product, bfloat16 or float32, contiguous along Q. stats: the largest residual, scanned norm and row norm of these rows.
    """
    pointers = (ctypes.c_void_p * len(products))(*(product.data_ptr() for product in products))
    num_rows, ld = len(products[0]), products[0].stride(0)
    tile = _Tile(
        batch=ctypes.addressof(batch.c),
        block=ctypes.addressof(rows.c),
        products=ctypes.addressof(pointers),
        ld=ld,
        num_rows=num_rows,
        first_row=first_row,
        group=batch.group,
        stats=stats,
    )
    bf16 = ctypes.c_int32(products[0].dtype == torch.bfloat16)
    _checked(_call("scan_tile", ctypes.byref(tile), bf16, _threads(batch.num_queries)))


def settle_block(batch: Batch, rows: Rows) -> None:
    """Score exactly what is left of a block's candidates."""
    _checked(_call("settle_block", ctypes.byref(batch.c), ctypes.byref(rows.c), _threads(batch.num_queries)))


def cast_rows(rows: Rows, start: int, stop: int, centre: Tensor, out: Tensor, max_norm: float) -> _Array | int:
    """Write rows start .. stop - 1 less `centre` (float32[D]) to `out`, bfloat16 or float32 [>= n, D].

    Returns float32[3]: the largest norms of what rounding lost, of what was written, and of the rows; or, as an int, the
    first row of the block that is not finite or has a norm above max_norm.
    """
    stats = np.zeros(3, np.float32)
    bad = _call(
        "cast_rows",
        ctypes.byref(rows.c),
        ctypes.c_int64(start),
        ctypes.c_int64(stop),
        ctypes.c_int64(rows.dim),
        ctypes.c_void_p(centre.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int32(out.dtype == torch.bfloat16),
        ctypes.c_float(max_norm),
        ctypes.c_void_p(stats.ctypes.data),
        _threads(stop - start),
    )
    _checked(bad == _NO_MEMORY)
    return bad if bad >= 0 else np.sqrt(stats)


def pair_dots(queries: Tensor, rows: Rows, left: Tensor, right: Tensor) -> Tensor:
    """float64[P]: `top_k.pair_dots` of float32 queries on the CPU, to the bit."""
    queries, left, right = queries.contiguous(), left.contiguous(), right.contiguous()
    out = torch.empty(len(left), dtype=torch.float64, device="cpu")
    failed = _call(
        "pair_dots",
        ctypes.c_void_p(queries.data_ptr()),
        ctypes.byref(rows.c),
        ctypes.c_void_p(left.data_ptr()),
        ctypes.c_void_p(right.data_ptr()),
        ctypes.c_int64(len(left)),
        ctypes.c_int64(rows.dim),
        ctypes.c_void_p(out.data_ptr()),
        _threads(len(left)),
    )
    _checked(failed)
    return out


def _call(name: str, *arguments: Any) -> int:
    library = _usable()
    if library is None:
        raise RuntimeError("the compiled loops are not there")
    function = getattr(library, name)
    function.restype = ctypes.c_int64 if name == "cast_rows" else ctypes.c_int
    return int(function(*arguments))
