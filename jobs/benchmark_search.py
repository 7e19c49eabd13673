"""How fast exact search is beside the bare matrix product and FAISS, alpha sweeps, and galleries that are streamed.

Called by jobs/benchmark.py. Every variant is called once a round, in turns; FAISS comes with `pip install slerp-tat[dev]`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import util
from typing import TYPE_CHECKING, Any

from cir_core.schema import CirError
from jobs.benchmark_training import Measured

if TYPE_CHECKING:
    import torch

    from jobs.benchmark import BenchmarkConfig

_TILE = 4096
NUM_ALPHAS = 21


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, all of them once a round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, call in variants.items():
            started = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def table(title: str, notes: str, seconds: dict[str, list[float]], *, over: str) -> Measured:
    """Medians, and each round's ratio to the variant `over`, as its median and range."""
    lines = [
        f"### {title}",
        "",
        notes,
        "",
        f"| | seconds, median of {len(seconds[over])} | over {over} [range] |",
        "|---|---|---|",
    ]
    metrics: dict[str, float] = {}
    for name, spent in seconds.items():
        ratios = sorted(one / base for one, base in zip(spent, seconds[over], strict=True))
        median = statistics.median(ratios)
        lines.append(f"| {name} | {statistics.median(spent):.3f} | {median:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] |")
        prefix = f"{title}/{name}".lower().replace(",", "")  # MLflow takes no commas
        metrics |= {f"{prefix}/seconds": statistics.median(spent), f"{prefix}/over {over}": median}
    return Measured("\n".join([*lines, ""]), metrics)


def measure_search(config: BenchmarkConfig) -> Measured:
    """Exact top 50 against the bare low-precision product and FAISS's IndexFlatIP; results are compared, too."""
    if config.use_gpu:
        from jobs.benchmark_search_gpu import measure_search_gpu

        return measure_search_gpu(config)
    import torch

    from cir_core.search import exact_top_k, kernels, prepare_gallery, sweep_top_k

    queries, texts, gallery = _unit(config.queries, config.dim, 1), _unit(config.queries, config.dim, 2), _rows(config)
    prepared = prepare_gallery(gallery)
    scanned = prepared.scanned
    columns = queries.to(scanned.dtype).T.contiguous()
    out = torch.empty(_TILE, config.queries, dtype=scanned.dtype)
    k, alphas = config.k, [number / (NUM_ALPHAS - 1) for number in range(NUM_ALPHAS)]

    def bare() -> None:
        for start in range(0, len(scanned), _TILE):
            rows = scanned[start : start + _TILE]
            torch.mm(rows, columns, out=out[: len(rows)])

    product = f"bare {str(scanned.dtype).removeprefix('torch.')} product"
    variants: dict[str, Callable[[], object]] = {
        product: bare,
        "exact_top_k, prepared gallery": lambda: exact_top_k(queries, prepared, k),
        "exact_top_k, plain float32 gallery": lambda: exact_top_k(queries, gallery, k),
        "exact_top_k, plain float16 gallery": lambda: exact_top_k(queries, half, k),
        "prepare_gallery": lambda: prepare_gallery(gallery),
        f"sweep_top_k, {NUM_ALPHAS} alphas, prepared": lambda: sweep_top_k(queries, texts, prepared, alphas, k),
    }
    half = gallery.half()
    notes = f"{config.queries} queries, {config.gallery_rows} x {config.dim} random unit rows, k = {k}; "
    notes += "compiled loops. " if kernels.is_compiled() else "NO compiled loops. "
    if util.find_spec("faiss"):
        notes += _add_faiss(variants, queries, gallery, exact_top_k(queries, prepared, k).indices, k)
    return table("Exact search", notes, interleaved(variants, config.rounds), over=product)


def _add_faiss(
    variants: dict[str, Callable[[], object]], queries: torch.Tensor, gallery: torch.Tensor, ours: torch.Tensor, k: int
) -> str:
    import faiss
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery.numpy())
    _, found = index.search(queries.numpy(), k)
    variants["FAISS IndexFlatIP"] = lambda: index.search(queries.numpy(), k)
    rows = int((torch.from_numpy(found) == ours).all(1).sum())
    return f"FAISS {faiss.__version__} gives the same ids in the same order for {rows} of {len(ours)} queries."


def measure_search_streamed(config: BenchmarkConfig) -> Measured:
    """A float16 store of Parquet parts, streamed with reading ahead, against reading alone and against it in memory."""
    import numpy as np

    from cir_core.embedding_store import EmbeddingStore, EmbeddingWriter, StoreSpec
    from cir_core.search import exact_top_k, prepare_gallery, read_ahead

    if config.use_gpu:
        raise CirError("search_streamed measures the processor; leave out --use_gpu")
    queries, gallery = _unit(config.queries, config.dim, 1), _rows(config).half()
    with tempfile.TemporaryDirectory() as folder:
        writer = EmbeddingWriter(
            folder, StoreSpec("random", "", "0", "", "0", "0", "0", config.dim, "float16", "rows", "fp32")
        )
        for index, start in enumerate(range(0, len(gallery), 100_000)):
            rows = gallery[start : start + 100_000]
            ids = [f"{index}-{row}" for row in range(len(rows))]
            writer.write_part(index, ids, np.asarray(rows.float()))
        writer.commit(rows_in=len(gallery))
        store, held = EmbeddingStore.open(folder), prepare_gallery(gallery)

        def blocks() -> Any:
            return ((block.offset, block.embeddings) for block in store.iter_blocks())

        variants: dict[str, Callable[[], object]] = {
            "in memory, prepared": lambda: exact_top_k(queries, held, config.k),
            "reading alone": lambda: [len(rows) for _, rows in blocks()],
            "streamed, one after the other": lambda: exact_top_k(queries, blocks(), config.k),
            "streamed, reading ahead": lambda: exact_top_k(queries, read_ahead(blocks()), config.k),
        }
        seconds = interleaved(variants, config.rounds)
    notes = (
        f"{config.queries} queries, {config.gallery_rows} x {config.dim} float16 rows in Parquet parts, k = {config.k}."
    )
    return table("Search of a gallery in storage", notes, seconds, over="reading alone")


def _unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    import torch

    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def _rows(config: BenchmarkConfig) -> torch.Tensor:
    return _unit(config.gallery_rows, config.dim, 3)
