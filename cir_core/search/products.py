"""The products of the scan on a CPU: in which dtype, and by which of torch's two matrix libraries.

float32 products come from MKL (torch.mm) or from oneDNN (linear on oneDNN tensors): MKL uses half the width of some
processors, and oneDNN need not be there. The bound of the scan holds for both: each adds D float32 products in some
order, with or without fused multiply-add, in IEEE float32, which is all that gamma_D asks for (scan.py). oneDNN can be
told to round what it multiplies; that it does not is checked, not assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from cir_core.search.scan import ieee_float32

_ROUNDS = 20  # of a trial, in milliseconds


@lru_cache(maxsize=1)
def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices clearly faster than float32 ones: tried once, in milliseconds."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    with ieee_float32(torch.device("cpu")):
        calls: list[Callable[[], object]] = []
        for dtype in (torch.float32, torch.bfloat16):
            rows, columns = (torch.ones(number, 256, dtype=dtype, device="cpu") for number in (1024, 128))
            out = torch.empty(1024, 128, dtype=dtype, device="cpu")
            calls.append(partial(multiply, rows, right_operand(columns), out))
        in_float32, in_bfloat16 = _shortest(calls)
    return in_bfloat16 < 0.75 * in_float32


@lru_cache(maxsize=1)
def fast_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices clearly faster than MKL here, and rounds nothing: tried once."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    with ieee_float32(torch.device("cpu")):
        # 1 + 2^-20 and these sums have 24 bits: any order of adding gives them, and any coarser number does not.
        rows = torch.full((1024, 16), 1 + 2.0**-20, device="cpu")
        columns = torch.ones(128, 16, device="cpu")
        columns[:, 1:] = 0
        for left, right in ((rows, columns.to_mkldnn()), (columns, rows.to_mkldnn())):
            if not bool((_linear(left, right) == 1 + 2.0**-20).all()):
                return False
        rows, columns = torch.ones(2048, 256, device="cpu"), torch.ones(128, 256, device="cpu")
        right, transposed = columns.to_mkldnn(), columns.T.contiguous()
        in_mkl, in_onednn = _shortest([lambda: torch.mm(rows, transposed), lambda: _linear(rows, right)])
    return in_onednn < 0.9 * in_mkl


def _shortest(calls: list[Callable[[], object]]) -> list[float]:
    """Seconds of the fastest of some calls each, in turns: another process may take the processor at any moment."""
    times = [float("inf")] * len(calls)
    for _ in range(_ROUNDS):
        for which, call in enumerate(calls):
            started = time.perf_counter()
            call()
            times[which] = min(times[which], time.perf_counter() - started)
    return times


def scan_dtype() -> torch.dtype:
    """What rows are cast to for the scan on this processor."""
    return torch.bfloat16 if fast_bfloat16() else torch.float32


def right_operand(vectors: Tensor) -> Tensor:
    """Vectors [Q, D] in the dtype of the scan as `multiply` takes them, which are the same for all tiles."""
    if vectors.dtype == torch.float32 and vectors.numel() and fast_onednn():
        return vectors.contiguous().to_mkldnn()
    return vectors.T.contiguous()


def multiply(rows: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """rows . vectors, [n, Q], contiguous: in `out` where the library can write there."""
    if right.is_mkldnn:
        return _linear(rows, right)
    return torch.mm(rows, right, out=out)


def _linear(rows: Tensor, right: Tensor) -> Tensor:
    return torch.nn.functional.linear(rows.to_mkldnn(), right).to_dense()
