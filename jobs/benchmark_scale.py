"""What a catalogue of many parts asks of a driver: listings, markers, manifest, plans, Ray's books, merging. Called by jobs/benchmark.py.

Parts are stand-ins with the names, sizes and row counts of real ones (sparse files), so 100,000 of them, a billion images,
fit on a laptop. Every step runs in a process of its own, for 1/10 of the parts and for all: what grows with them shows.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.benchmark_training import Measured

if TYPE_CHECKING:
    from cir_core.embedding_store import EmbeddingWriter
    from jobs.benchmark import BenchmarkConfig

_PART_ROWS = 10_000  # img2dataset's
_PART_BYTES = 10_400_000
_SHARE_PARTS = 1163  # 24 GB of 512 numbers: cluster/sizing.py
_QUERIES = 4096  # of a tile


def _writer(home: str) -> EmbeddingWriter:
    from cir_core.embedding_store import EmbeddingWriter, StoreSpec

    digest = "0123456789abcdef" * 4
    spec = StoreSpec(
        "ViT-B-32", "openai", digest, "", digest, digest, "center_crop-224", 512, "float16", digest, "fp32"
    )
    return EmbeddingWriter(f"{home}/store", spec)


def make_parts(home: str, count: int) -> None:
    """Make `count` empty shards, and parts with their markers."""
    from cir_core.embedding_store import PartInfo

    digest = "0123456789abcdef" * 4
    writer = _writer(home)
    shards, store = Path(home) / "shards", Path(home) / "store"
    shards.mkdir(exist_ok=True)
    for index in range(count):
        (shards / f"{index:06d}.tar").touch()
        part = PartInfo(index, f"part-{index:05d}", _PART_ROWS, 0, digest, digest, _PART_BYTES, ())
        with (store / f"{part.name}.parquet").open("wb") as file:
            file.truncate(_PART_BYTES)
        marker = {"identity": writer.spec.identity, **asdict(part)}
        (store / "_progress" / f"{part.name}.json").write_text(json.dumps(marker))


def _list_shards(home: str, _count: int) -> int:
    from jobs.embedding import find_units

    return len(find_units(f"{home}/shards")[0])


def _finished_parts(home: str, _count: int) -> int:
    return len(_writer(home).finished_parts())


def _commit(home: str, count: int) -> int:
    return len(_writer(home).commit(rows_in=count * _PART_ROWS, check_unique_ids=False).parts)


def _open_store(home: str, _count: int) -> int:
    from cir_core.embedding_store import EmbeddingStore

    return len(EmbeddingStore.open(f"{home}/store").parts)


def _plan_search(home: str, count: int) -> int:
    import numpy as np

    from jobs.gallery_search import Gallery

    gallery = Gallery(f"{home}/store")
    parts = gallery.parts()
    return sum(len(share) for share in np.array_split(parts, -(-count // _SHARE_PARTS)))


class _Nothing:
    """What the embedding actor is to Ray Data, without the work."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"told": batch["unit"]}


def _ray_data(home: str, count: int) -> int:
    import ray.data
    from ray.data import ActorPoolStrategy

    from jobs.embedding import MAX_BLOCKS, find_units
    from jobs.session import connect

    units = [{"plan": 0, "unit": unit.packed()} for unit in find_units(f"{home}/shards")[0][:MAX_BLOCKS]]
    connect()
    dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        _Nothing, batch_size=1, compute=ActorPoolStrategy(size=1), num_cpus=0.5
    )
    dataset.context.target_max_block_size = 1
    return count if sum(1 for _ in dataset.iter_rows()) == len(units) else 0


def _merge(_home: str, count: int) -> int:
    """Merge a tile's lists of all shares, eight at a time, in one process."""
    import torch

    from cir_core.search import TopK, merge_top_k
    from jobs.gallery_search import FAN_IN

    shares = -(-count // _SHARE_PARTS)
    random = torch.Generator().manual_seed(0)
    found = [
        TopK(
            torch.rand(_QUERIES, 50, generator=random).sort(descending=True).values,
            torch.arange(50).expand(_QUERIES, 50) + share * _SHARE_PARTS * _PART_ROWS,
        )
        for share in range(shares)
    ]
    while len(found) > 1:
        found = [merge_top_k(found[start : start + FAN_IN], 50) for start in range(0, len(found), FAN_IN)]
    return count


STEPS: tuple[tuple[str, str, Callable[[str, int], int]], ...] = (
    ("list_shards", "list the shards, plan the units", _list_shards),
    ("finished_parts", "what is finished, by listing and markers", _finished_parts),
    ("ray_data", "2,000 units through Ray Data, the actor doing nothing (start of Ray, too)", _ray_data),
    ("commit", "check and commit the manifest", _commit),
    ("open", "open the store", _open_store),
    ("plan_search", "plan the shares of a search", _plan_search),
    ("merge", f"merge a tile of {_QUERIES} queries' lists of all shares, one process", _merge),
)


def _timed(step: Callable[[str, int], int], home: str, count: int) -> tuple[float, float]:
    """Return seconds and the megabytes that this process, which is new, grew by."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    done = step(home, count)
    if done != count:
        raise RuntimeError(f"{step.__name__}: {done} of {count} parts")
    return time.perf_counter() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def measure_scale(config: BenchmarkConfig) -> Measured:
    """Time and memory of each step for a tenth of the parts and for all, with local files."""
    counts = (max(1, config.parts // 10), config.parts)
    found: dict[tuple[str, int], tuple[float, float]] = {}
    spawn = multiprocessing.get_context("spawn")
    for count in counts:
        with tempfile.TemporaryDirectory() as home:
            make_parts(home, count)
            for key, _, step in STEPS:
                with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    found[key, count] = pool.submit(_timed, step, home, count).result()
    cells = {
        key: [f"{seconds:.2f} | {megabytes:.0f}" for seconds, megabytes in (found[key, count] for count in counts)]
        for key, _, _ in STEPS
    }
    head = " | ".join(f"{count:,} parts: s | MB" for count in counts)
    rows = [f"| {name} | {' | '.join(cells[key])} |" for key, name, _ in STEPS]
    notes = (
        f"Stand-ins for parts of {_PART_ROWS:,} rows of 512 numbers, on a local disk; each step in a process of its own, with its "
        "imports: seconds, and the memory by which the process grew."
    )
    table = [f"| | {head} |", "|---" * (1 + 2 * len(counts)) + "|", *rows]
    metrics = {
        f"scale/{key}_{unit}_{count}": value
        for (key, count), values in found.items()
        for unit, value in zip(("seconds", "megabytes"), values, strict=True)
    }
    return Measured("\n".join(["### Scale", "", notes, "", *table, ""]), metrics)
