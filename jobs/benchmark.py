"""Measurements of this code on this machine, printed as Markdown: what a README's figures come from.

    python jobs/benchmark.py --measure '[text_anchors]'                       # a training step with and without cached anchors
    python jobs/benchmark.py --measure '[text_anchors]' --model ViT-B-32 --batch_size 32 --rounds 5
    python jobs/benchmark.py --measure '[encoder]' --model ViT-B-32 --batch_size 32 --rounds 5 --steps_per_round 1
    python jobs/benchmark.py --measure '[training_peft, training_open_clip, training_caching]' --model ViT-B-32 --batch_size 16
    python jobs/benchmark.py --measure '[training_job]' --model ViT-B-32 --batch_size 16 --images 240 --rounds 5
    python jobs/benchmark.py --measure '[embedding, embedding_memory]' --model ViT-B-32 --images 400 --batch_size 64 --rounds 3

    python jobs/benchmark.py --measure '[scale]' --parts 100000
    python jobs/benchmark.py --measure '[start_up]' --rounds 3            # with the servers of `make up`
    python jobs/benchmark.py --measure '[search, search_streamed]' --tracking_uri http://127.0.0.1:5000      # and into MLflow
    python jobs/benchmark.py --measure '[search]' --use_gpu true --queries 2048 --gallery_rows 8000000       # on the first GPU

A and B of a comparison take turns, so that a busy neighbour or a warm processor meets both; the median is reported, with
the ratio and its range over the rounds. Ray only to embed and for training_job; MLflow only where --tracking_uri is given. A
model without --pretrained gets random weights: they take the same time. Where others use the machine too, OMP_NUM_THREADS=1
and the ratio of CPU time repeat to a few percent.
"""

from __future__ import annotations

import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt

from cir_core.schema import CirError
from jobs import tracking
from jobs.benchmark_embedding import measure_embedding, measure_embedding_memory
from jobs.benchmark_encoder import measure_encoder
from jobs.benchmark_scale import measure_scale
from jobs.benchmark_search import measure_search, measure_search_streamed
from jobs.benchmark_start_up import measure_start_up
from jobs.benchmark_training import (
    Measured,
    measure_training_caching,
    measure_training_open_clip,
    measure_training_peft,
)
from jobs.benchmark_training_job import measure_training_job
from jobs.config import JobConfig, flat_parameters, parse_config
from jobs.session import code_version, run, say

if TYPE_CHECKING:
    from cir_core.encoders.two_tower import OpenClipEncoder

_WARM_UP_ROUNDS = 1


class BenchmarkConfig(JobConfig):
    """Settings of a measurement."""

    measure: Annotated[list[str], Field(min_length=1)] = Field(
        ["text_anchors"],
        description="What to measure: text_anchors (a training step with and without them), encoder (both towers, fp32 and bf16, "
        "beside open_clip's calls), embedding (embed.py, a bare loop of the same model, and decoding alone), embedding_memory "
        "(for 1, 4 and 16 times the data), search (exact search, the bare product, FAISS), search_streamed (a gallery in Parquet parts), training_peft, training_open_clip (our step beside "
        "theirs), training_caching (gradient caching and checkpointing), training_job (tat_train.py beside a bare loop of its "
        "step), start_up (from `ray job submit` to the first step and the first search result), scale (what many parts ask of a "
        "driver).",
    )
    model: str = Field("scenes-tiny", description="open_clip model name, local-dir:/path, or 'scenes-tiny'.")
    pretrained: str | None = Field(
        None, description="Weights tag or .safetensors file; none: random weights for a named model."
    )
    batch_size: PositiveInt = Field(128, description="Samples per step.")
    rounds: PositiveInt = Field(7, description="Turns of A and B after a first one that is not counted.")
    steps_per_round: PositiveInt = Field(2, description="Steps of a turn.")
    micro_batch_size: Annotated[int, Field(ge=0)] = Field(
        0, description="Samples of a micro-batch of training_caching; 0: a quarter of the batch."
    )
    data: str = Field("", description="Shards to embed, or of pairs to train on; empty: generated JPEG photographs.")
    images: PositiveInt = Field(1000, description="Photographs to generate.")
    side: PositiveInt = Field(512, description="Their longer side in pixels.")
    queries: PositiveInt = Field(256, description="Queries of a search.")
    gallery_rows: PositiveInt = Field(400_000, description="Rows of the gallery that is searched.")
    dim: PositiveInt = Field(512, description="Its embedding dimensions.")
    k: PositiveInt = Field(50, description="Length of the lists.")
    parts: PositiveInt = Field(100_000, description="Parts of 10,000 images that scale is measured for.")
    use_gpu: bool = Field(False, description="Measure on the first GPU, in bf16 as training does there.")


@dataclass(frozen=True)
class Turns:
    """Rates of one side, round by round: samples per second, and per second of this process's CPU time."""

    per_second: list[float]
    per_cpu_second: list[float]


@dataclass(frozen=True)
class Comparison:
    """A and B, measured in turns: their names, rates, and what was measured."""

    title: str
    names: tuple[str, str]
    turns: tuple[Turns, Turns]
    notes: str

    def markdown(self) -> str:
        """Return a table of medians, and of B / A with its range over the rounds.

        The ratio of CPU time is the one to trust on a machine that others use too; on a GPU it says nothing.
        """
        head = f"| median of {len(self.turns[0].per_second)} rounds | samples/s | samples per CPU-second |"
        rows = [
            f"| {name} | {statistics.median(side.per_second):.1f} | {statistics.median(side.per_cpu_second):.1f} |"
            for name, side in zip(self.names, self.turns, strict=True)
        ]
        a, b = self.turns
        ratios = [_ratio(a.per_second, b.per_second), _ratio(a.per_cpu_second, b.per_cpu_second)]
        rows.append(f"| ratio [range] | {' | '.join(ratios)} |")
        return "\n".join([f"### {self.title}", "", self.notes, "", head, "|---|---|---|", *rows, ""])


def _ratio(a: Sequence[float], b: Sequence[float]) -> str:
    ratios = sorted(two / one for one, two in zip(a, b, strict=True))
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


def in_turns(a: Callable[[], None], b: Callable[[], None], *, rounds: int, samples: int) -> tuple[Turns, Turns]:
    """Call a and b in turns, each first in every other round; `samples` go through one call."""
    sides = (Turns([], []), Turns([], []))
    for number in range(_WARM_UP_ROUNDS + rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            wall, cpu = time.perf_counter(), time.process_time()
            (a, b)[which]()
            if number >= _WARM_UP_ROUNDS:
                sides[which].per_second.append(samples / (time.perf_counter() - wall))
                sides[which].per_cpu_second.append(samples / (time.process_time() - cpu))
    return sides


def measure_text_anchors(config: BenchmarkConfig) -> Comparison:
    """A training step that embeds its captions against one that is given their anchors; images are decoded already."""
    import torch

    from cir_core.lora import attach_lora
    from cir_core.tuning import TextAnchoredTuner, TuningSettings

    encoder = load_model(config)
    torch.manual_seed(0)
    attach_lora(encoder.model, r=16, lora_alpha=16, lora_dropout=0.1, target_modules=("q_proj", "v_proj"))
    encoder.model.to(encoder.device)
    settings = TuningSettings(total_steps=1_000_000, lr=1e-4, precision=encoder.details.precision)
    tuner = TextAnchoredTuner(encoder, settings)
    size = encoder.preprocessing.size
    images = torch.randint(0, 256, (config.batch_size, 3, size, size), dtype=torch.uint8)
    captions = [f"a red circle above two small squares, number {number}" for number in range(config.batch_size)]
    valid = torch.ones(config.batch_size, dtype=torch.bool)
    anchors = encoder.encode_texts(captions).cpu()

    def steps(texts: list[str] | torch.Tensor) -> None:
        for index in range(config.steps_per_round):
            tuner.step(index, images, texts, valid)
        if config.use_gpu:
            torch.cuda.synchronize()

    turns = in_turns(
        lambda: steps(captions),
        lambda: steps(anchors),
        rounds=config.rounds,
        samples=config.steps_per_round * config.batch_size,
    )
    weights = config.pretrained or ("its own" if config.model == "scenes-tiny" else "random")
    notes = (
        f"Training step of {config.model} ({weights} weights), batch {config.batch_size}, {settings.precision}, "
        "LoRA r 16 on q_proj and v_proj; images decoded before."
    )
    return Comparison("Cached text anchors", ("captions through the text tower", "cached anchors"), turns, notes)


MEASUREMENTS: dict[str, Callable[[BenchmarkConfig], str | Measured]] = {
    "text_anchors": lambda config: measure_text_anchors(config).markdown(),
    "encoder": measure_encoder,
    "embedding": measure_embedding,
    "embedding_memory": measure_embedding_memory,
    "search": measure_search,
    "search_streamed": measure_search_streamed,
    "training_peft": measure_training_peft,
    "training_open_clip": measure_training_open_clip,
    "training_caching": measure_training_caching,
    "training_job": measure_training_job,
    "start_up": measure_start_up,
    "scale": measure_scale,
}


def load_model(config: BenchmarkConfig, precision: str = "auto") -> OpenClipEncoder:
    """Load the model; a name without weights gets random ones, which cost the same time."""
    import open_clip
    from safetensors.torch import save_file

    from cir_core.encoders import load_encoder

    device = "cuda" if config.use_gpu else "cpu"
    if config.pretrained is not None or config.model not in open_clip.list_models():
        return load_encoder(config.model, config.pretrained, device=device, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.safetensors"
        save_file(open_clip.create_model(config.model).state_dict(), weights)
        return load_encoder(config.model, str(weights), device=device, precision=precision)


def surroundings(config: BenchmarkConfig) -> str:
    """Return one line on hardware and versions, without which no figure means anything."""
    cores = len(os.sched_getaffinity(0))
    hardware = f"{cores} cores of {_processor()}"
    if config.use_gpu:
        import torch

        hardware = f"{torch.cuda.get_device_name()}, {hardware}"
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "open_clip_torch", "numpy"))
    return f"{hardware}; Python {platform.python_version()}, {packages}; code {code_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def check_names(names: Sequence[str]) -> None:
    """Raise CirError for a name that nothing measures."""
    for name in names:
        if name not in MEASUREMENTS:
            raise CirError(f"measure: unknown name {name!r}; known are {', '.join(MEASUREMENTS)}")


def main() -> None:
    """Measure what was asked for, one after the other, and print each as it ends."""
    config = parse_config(BenchmarkConfig, "benchmark", __doc__.split("\n")[0])
    check_names(config.measure)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which the notes name
    tracker = start_tracking(config)
    tables: list[str] = []
    metrics: dict[str, float] = {}
    for name in config.measure:
        found = MEASUREMENTS[name](config)
        if isinstance(found, Measured):
            metrics |= found.metrics
            found = found.markdown
        say(found)
        tables.append(found)
    say(surroundings(config))
    if tracker is not None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "benchmark.md").write_text("\n".join([*tables, surroundings(config), ""]))
            tracker.log_folder(folder)
        tracker.log_metrics(metrics)
        tracker.finish()
        say(f"MLflow: {tracker.page}")


def start_tracking(config: BenchmarkConfig) -> tracking.Tracker | None:
    """Open a run of the experiment "benchmark", where a tracking server was named."""
    if not config.tracking_uri:
        return None
    uri = tracking.resolve_uri(config.tracking_uri)
    tracking.check_server(uri)
    parameters = flat_parameters(config) | {"hardware": surroundings(config)}
    tags = {"job": "benchmark", "code_version": code_version()}
    name = "-".join(config.measure)
    return tracking.Tracker.start(uri, experiment="benchmark", name=name, parameters=parameters, tags=tags)


if __name__ == "__main__":
    run(main)
