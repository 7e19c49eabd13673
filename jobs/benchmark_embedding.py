"""How fast the embedding pipeline is beside the same model in a bare loop and beside decoding alone, and its memory.

Called by jobs/benchmark.py; needs a Ray cluster (it starts a local one where none runs).
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import ray
from PIL import Image, ImageFilter

from cir_core import files
from cir_core.preprocessing import Preprocessing, preprocess_image
from cir_core.schema import CirError
from cir_core.shards import Sample, list_shards, read_shard, write_tar_shard
from jobs.benchmark_training import ratios
from jobs.session import connect, say

if TYPE_CHECKING:
    from cir_core.encoders.two_tower import OpenClipEncoder
    from jobs.benchmark import BenchmarkConfig
    from jobs.embedder import EmbedPlan

_SHARDS = 40  # so that the ends of the first and the last one do not matter
_FEWEST = 8
_DIFFERENT = 200  # pictures, the rest repeat them
_SAMPLE_S = 0.25


def write_photos(folder: str, count: int, *, side: int, shard_images: int | None = None) -> None:
    """Write shards of JPEG pictures with the detail of photographs: noise at every scale, and edges. Reused if there.

    The pictures repeat after the first ones, each time with another key. shard_images: by default, a fortieth of all.
    """
    shard_images = shard_images or max(1, count // _SHARDS)
    pictures: list[bytes] = []
    for start in range(0, count, shard_images):
        uri = files.join(folder, f"{start // shard_images:05d}.tar")
        if files.exists(uri):
            continue
        pictures = pictures or [_photo(number, side) for number in range(min(count, _DIFFERENT))]
        numbers = range(start, min(start + shard_images, count))
        samples = ((f"photo{number:08d}", pictures[number % len(pictures)], "jpg", "a photo") for number in numbers)
        write_tar_shard(uri, samples)


def _photo(seed: int, side: int) -> bytes:
    random = np.random.default_rng(seed)
    width, height = side, side * 3 // 4
    pixels = np.zeros((height, width, 3), np.float32)
    cells = 4
    while cells <= width:
        grain = (random.random((cells * 3 // 4, cells, 3)) * 255).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(grain).resize((width, height), Image.Resampling.BILINEAR)) / cells**0.8
        cells *= 2
    scaled = (255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.uint8)
    image = Image.fromarray(scaled).filter(ImageFilter.UnsharpMask(2, 120))
    target = io.BytesIO()
    image.save(target, "JPEG", quality=88)
    return target.getvalue()


def bare_loop(encoder: OpenClipEncoder, shards: Sequence[str], batch_size: int) -> float:
    """Read, decode and encode in one process, one after the other; return images/s."""
    import torch

    started, count = time.perf_counter(), 0
    batch: list[Any] = []

    def flush() -> None:
        if batch:
            encoder.encode_images(torch.from_numpy(np.stack(batch)))
            batch.clear()

    for shard in shards:
        for row in read_shard(shard, require_caption=False):
            if isinstance(row, Sample):
                batch.append(preprocess_image(row.image, encoder.preprocessing))
                count += 1
            if len(batch) == batch_size:
                flush()
    flush()
    return count / (time.perf_counter() - started)


def _decode_shard(shard: str, preprocessing: Preprocessing) -> int:
    rows = [row for row in read_shard(shard, require_caption=False) if isinstance(row, Sample)]
    for row in rows:
        preprocess_image(row.image, preprocessing)
    return len(rows)


def decode_only(pool: ProcessPoolExecutor, shards: Sequence[str], preprocessing: Preprocessing) -> float:
    """Read and decode on all cores, nothing else; return images/s."""
    started = time.perf_counter()
    count = sum(pool.map(_decode_shard, shards, [preprocessing] * len(shards)))
    return count / (time.perf_counter() - started)


def pipeline(plan: EmbedPlan) -> float:
    """Embed on Ray; return images/s from the end of the second part to that of the last: starting is timed apart.

    Two parts are under way at once, so what is done of a third by then is what is missing of the last but one at the end.

    Raises:
        CirError: too few shards to measure anything.
    """
    from jobs.embedding import embed_stores

    (store,) = embed_stores([plan], num_encoders=1, max_rejects=0)
    progress = Path(plan.output) / "_progress"
    ends = sorted(((progress / f"{part.name}.json").stat().st_mtime, part.num_rows) for part in store.parts)
    if len(ends) < _FEWEST:
        raise CirError(f"data: {len(ends)} shards; at least {_FEWEST} are needed to measure a rate")
    return sum(rows for _, rows in ends[2:]) / (ends[-1][0] - ends[1][0])


def make_plan(
    config: BenchmarkConfig, encoder: OpenClipEncoder, model: str, weights: str | None, output: str, data: str
) -> EmbedPlan:
    """Plan an embedding of `data`, as embed.py does."""
    from jobs.embedder import EmbedPlan
    from jobs.embedding import find_units, store_spec

    units, digest = find_units(data)
    return EmbedPlan(
        units=tuple(units),
        output=output,
        spec=store_spec(encoder.details, dtype="float32", captions="no", input_digest=digest),
        model=model,
        pretrained=weights,
        adapter=None,
        preprocessing_mode=None,
        captions="no",
        batch_size=config.batch_size,
        use_gpu=config.use_gpu,
    )


@dataclass
class MemoryWatch:
    """Private memory (USS) of the workers of this job's cluster over time, in MB: of encoders and of decoders."""

    names: tuple[str, ...] = ("ShardEmbedder", "decode_images")
    times: list[float] = field(default_factory=list)
    megabytes: dict[str, list[float]] = field(default_factory=dict)

    def __enter__(self) -> MemoryWatch:
        self._ending = threading.Event()
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(_SAMPLE_S):
            self.times.append(time.perf_counter() - self._started)
            found = dict.fromkeys(self.names, 0.0)
            for name, megabytes in self._workers():
                found[name] = max(found[name], megabytes)
            for name, value in found.items():
                self.megabytes.setdefault(name, []).append(value)

    def _workers(self) -> Iterator[tuple[str, float]]:
        session = ray.get_runtime_context().get_session_name()
        for process in psutil.process_iter():
            try:
                title, parent = " ".join(process.cmdline()), process.parent()
                ours = "ray::" in title and parent is not None and session in " ".join(parent.cmdline())
                for name in self.names:
                    if ours and name in title:
                        yield name, process.memory_full_info().uss / 1e6
            except psutil.Error:
                continue

    def over_time(self, name: str) -> list[float]:
        """Return the memory of one kind of worker at 25, 50 and 75 % of the time that there was one, and its peak."""
        found = [value for value in self.megabytes.get(name, []) if value] or [0.0]
        return [found[len(found) * share // 100] for share in (25, 50, 75)] + [max(found)]


def measure_embedding(config: BenchmarkConfig) -> str:
    """The embedding job against a bare loop of the same model and against decoding alone, in turns; Markdown."""
    from jobs.benchmark import load_model

    with tempfile.TemporaryDirectory() as home:
        data = config.data or files.join(home, "photos")
        if not config.data:
            shard_images = max(config.batch_size, config.images // _SHARDS)  # a batch is of one shard
            write_photos(data, config.images, side=config.side, shard_images=shard_images)
        shards = list_shards(data)
        model, weights = saved_model(config, Path(home))
        encoder = load_model(config)
        rates: dict[str, list[float]] = {"bare loop": [], "embed.py": [], "decoding alone": []}
        connect()
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for number in range(config.rounds + 1):  # the first is not counted
                output = files.join(home, f"store-{number}")
                found = {
                    "bare loop": bare_loop(encoder, shards, config.batch_size),
                    "embed.py": pipeline(make_plan(config, encoder, model, weights, output, data)),
                    "decoding alone": decode_only(pool, shards, encoder.preprocessing),
                }
                for name, rate in found.items():
                    rates[name] += [rate] if number else []
    lines = []
    for name, measured in rates.items():
        each = ratios(rates["embed.py"], measured)
        lines.append(
            f"| {name} | {statistics.median(measured):.1f} | {statistics.median(each):.2f} [{each[0]:.2f}, {each[-1]:.2f}] |"
        )
    source = config.data or f"{config.images} generated JPEG photographs of {config.side} pixels"
    notes = f"{config.model}, batch {config.batch_size}, {source}; medians of {config.rounds} rounds in turns."
    table = ["| | images/s | embed.py / this |", "|---|---|---|", *lines]
    return "\n".join(["### Embedding", "", notes, "", *table, ""])


def measure_embedding_memory(config: BenchmarkConfig) -> str:
    """Memory of an embedding run for 1, 4 and 16 times the data, in more shards and in larger ones; Markdown, and a plot."""
    from jobs.benchmark import load_model
    from jobs.embedding import embed_stores

    rows = []
    with tempfile.TemporaryDirectory() as home:
        model, weights = saved_model(config, Path(home))
        encoder = load_model(config)
        connect()
        for times, one_shard in ((1, True), (4, True), (16, True), (4, False), (16, False)):
            data = files.join(home, f"photos-{times}-{one_shard}")
            count = config.images * times
            write_photos(data, count, side=config.side, shard_images=count if one_shard else config.images)
            size = sum(file.size_bytes for file in files.list_files(data)) / 1e6
            plan = make_plan(config, encoder, model, weights, files.join(home, f"store-{times}-{one_shard}"), data)
            with MemoryWatch() as watch:
                (store,) = embed_stores([plan], num_encoders=1, max_rejects=0)
            label = f"{times}x, {'one shard' if one_shard else f'{times} shards'}"
            cells = [" | ".join(f"{value:.0f}" for value in watch.over_time(name)) for name in watch.names]
            rows.append(f"| {label} | {size:.0f} | {store.num_rows} | {' | '.join(cells)} |")
            say(rows[-1])
    columns = [f"{kind} {when}" for kind in ("encoder", "decoder") for when in ("25 %", "50 %", "75 %", "peak")]
    notes = (
        f"{config.model}, batch {config.batch_size}; private memory (USS) of the largest worker of a kind, in MB, at 25, 50 "
        "and 75 % of the time that there was one, and the peak."
    )
    head = f"| data | MB | images | {' | '.join(columns)} |"
    return "\n".join(["### Memory of embedding", "", notes, "", head, "|---" * (3 + len(columns)) + "|", *rows, ""])


def saved_model(config: BenchmarkConfig, home: Path) -> tuple[str, str | None]:
    """Return a model and weights that another process can load: random weights are saved once."""
    import open_clip
    from safetensors.torch import save_file

    if config.pretrained is not None or config.model not in open_clip.list_models():
        return config.model, config.pretrained
    weights = home / "random.safetensors"
    save_file(open_clip.create_model(config.model).state_dict(), weights)
    return config.model, str(weights)
