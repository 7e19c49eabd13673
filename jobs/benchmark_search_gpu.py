"""How fast exact search is on a GPU, beside the bare bfloat16 product of the same shape and the device's own peak.

    python jobs/benchmark.py --measure '[search]' --use_gpu true --queries 2048 --gallery_rows 8000000

Every variant is called once a round, in turns, and ends when the device has finished. The peak is that of a large square
product, measured in the same turns. Nobody has run this on a GPU so far; its test runs it on the CPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from cir_core.schema import CirError
from jobs.benchmark_search import NUM_ALPHAS, interleaved, table
from jobs.benchmark_training import Measured

if TYPE_CHECKING:
    import torch

    from jobs.benchmark import BenchmarkConfig

_BATCH, _TILE = 2048, 2**18  # queries and rows of one bare product: it stores 1 GiB, as the scan's does
_FILL = 2**18  # rows made at a time
_CHECKED = 8  # queries whose results the processor finds as well
_PEAK = "square bfloat16 product"


def measure_search_gpu(config: BenchmarkConfig) -> Measured:
    """Measure on the first GPU; CirError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise CirError("--use_gpu: torch finds no CUDA device here; leave it out to measure the processor")
    return measure_search_on(config, torch.device("cuda", torch.cuda.current_device()), side=8192)


def measure_search_on(config: BenchmarkConfig, device: torch.device, *, side: int) -> Measured:
    """Exact search where the gallery is on `device` or comes from host memory. side: of the square product."""
    import torch

    from cir_core.search import exact_top_k, prepare_gallery, sweep_top_k

    queries, texts = (random_rows(config.queries, config.dim, device, seed).float() for seed in (1, 2))
    gallery = random_rows(config.gallery_rows, config.dim, device, 3)
    prepared, on_host = prepare_gallery(gallery), gallery.cpu()
    square = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    k, alphas = config.k, [number / (NUM_ALPHAS - 1) for number in range(NUM_ALPHAS)]
    product = "bare bfloat16 product"
    calls: dict[str, Callable[[], object]] = {
        product: bare_product(queries, gallery.to(torch.bfloat16)),
        _PEAK: lambda: torch.mm(square, square),
        "exact_top_k, prepared gallery": lambda: exact_top_k(queries, prepared, k),
        "exact_top_k, plain float16 gallery": lambda: exact_top_k(queries, gallery, k),
        "exact_top_k, float16 gallery in host memory": lambda: exact_top_k(queries, on_host, k),
        "prepare_gallery": lambda: prepare_gallery(gallery),
        f"sweep_top_k, {NUM_ALPHAS} alphas, prepared": lambda: sweep_top_k(queries, texts, prepared, alphas, k),
    }
    found = exact_top_k(queries, prepared, k).indices[:_CHECKED].cpu()
    expected = exact_top_k(queries[:_CHECKED].cpu(), on_host, k).indices
    seconds = interleaved({name: finished(call, device) for name, call in calls.items()}, config.rounds)
    rates = {
        name: (2e-12 * side**3 if name == _PEAK else 2e-12 * config.queries * config.gallery_rows * config.dim)
        / statistics.median(seconds[name])
        for name in (product, _PEAK, "exact_top_k, prepared gallery")
    }
    notes = (
        f"{config.queries} queries, {config.gallery_rows} x {config.dim} random unit rows in float16, k = {k}, on {device}; the "
        f"processor finds the same rows in the same order for {int((found == expected).all(1).sum())} of {len(found)} queries. "
        + ", ".join(f"{name}: {rate:.2f} TFLOP/s" for name, rate in rates.items())
    )
    share = rates["exact_top_k, prepared gallery"] / rates[_PEAK]
    measured = table(
        "Exact search on a GPU", f"{notes}; share of the square product's: {share:.2f}.", seconds, over=product
    )
    return Measured(measured.markdown, measured.metrics | {"exact search on a gpu/share of peak": share})


def finished(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Return a call that returns when the device is done with it."""
    import torch

    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def bare_product(queries: torch.Tensor, rows: torch.Tensor) -> Callable[[], None]:
    """Return what only multiplies, by tiles into one buffer, and keeps nothing."""
    import torch

    columns = queries.to(torch.bfloat16)
    out = torch.empty(min(_BATCH, len(columns)) * min(_TILE, len(rows)), dtype=torch.bfloat16, device=rows.device)

    def run() -> None:
        for start in range(0, len(rows), _TILE):
            tile = rows[start : start + _TILE].T
            for first in range(0, len(columns), _BATCH):
                some = columns[first : first + _BATCH]
                torch.mm(some, tile, out=out[: len(some) * tile.shape[1]].view(len(some), -1))

    return run


def random_rows(num_rows: int, dim: int, device: torch.device, seed: int) -> torch.Tensor:
    """float16 [N, D] of unit norm, made where they are."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.empty(num_rows, dim, dtype=torch.float16, device=device)
    for start in range(0, num_rows, _FILL):
        part = rows[start : start + _FILL]
        part.copy_(torch.nn.functional.normalize(torch.randn(part.shape, generator=generator, device=device), dim=1))
    return rows
