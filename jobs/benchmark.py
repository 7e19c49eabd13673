"""Measurements of this code on this machine, printed as Markdown: what a README's figures come from.

    python jobs/benchmark.py --measure '[text_anchors]'                       # a training step with and without cached anchors
    python jobs/benchmark.py --measure '[text_anchors]' --model ViT-B-32 --batch_size 32 --rounds 5

A and B of a comparison take turns, so that a busy neighbour or a warm processor meets both; the median is reported, with
the ratio and its range over the rounds. Needs neither Ray nor MLflow. A model without --pretrained gets random weights:
they take the same time.
"""

from __future__ import annotations

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
from jobs.config import JobConfig, parse_config
from jobs.session import code_version, run, say

if TYPE_CHECKING:
    from cir_core.encoders.two_tower import OpenClipEncoder

_WARM_UP_ROUNDS = 1


class BenchmarkConfig(JobConfig):
    """Settings of a measurement."""

    measure: Annotated[list[str], Field(min_length=1)] = Field(
        ["text_anchors"], description="What to measure: text_anchors (a training step with and without them)."
    )
    model: str = Field("scenes-tiny", description="open_clip model name, local-dir:/path, or 'scenes-tiny'.")
    pretrained: str | None = Field(
        None, description="Weights tag or .safetensors file; none: random weights for a named model."
    )
    batch_size: PositiveInt = Field(128, description="Samples per step.")
    rounds: PositiveInt = Field(7, description="Turns of A and B after a first one that is not counted.")
    steps_per_round: PositiveInt = Field(2, description="Steps of a turn.")
    use_gpu: bool = Field(False, description="Measure on the first GPU, in bf16 as training does there.")


@dataclass(frozen=True)
class Comparison:
    """A and B, measured in turns. rates_a, rates_b: samples/s of each round."""

    title: str
    a: str
    b: str
    rates_a: tuple[float, ...]
    rates_b: tuple[float, ...]
    notes: str

    def markdown(self) -> str:
        """Return a table of medians and B / A with its range over the rounds."""
        ratios = sorted(b / a for a, b in zip(self.rates_a, self.rates_b, strict=True))
        a, b = statistics.median(self.rates_a), statistics.median(self.rates_b)
        return (
            f"### {self.title}\n\n{self.notes}\n\n"
            f"| | samples/s (median of {len(ratios)}) |\n|---|---|\n| {self.a} | {a:.1f} |\n| {self.b} | {b:.1f} |\n"
            f"| ratio | {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] |\n"
        )


def in_turns(
    a: Callable[[], None], b: Callable[[], None], *, rounds: int, samples: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Call a and b in turns, each first in every other round, and return samples/s of both, round by round."""
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(_WARM_UP_ROUNDS + rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            started = time.perf_counter()
            (a, b)[which]()
            if number >= _WARM_UP_ROUNDS:
                rates[which].append(samples / (time.perf_counter() - started))
    return tuple(rates[0]), tuple(rates[1])


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

    rates_a, rates_b = in_turns(
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
    return Comparison(
        "Cached text anchors", "captions through the text tower", "cached anchors", rates_a, rates_b, notes
    )


MEASUREMENTS: dict[str, Callable[[BenchmarkConfig], Comparison]] = {"text_anchors": measure_text_anchors}


def load_model(config: BenchmarkConfig) -> OpenClipEncoder:
    """Load the model; a name without weights gets random ones, which cost the same time."""
    import open_clip
    from safetensors.torch import save_file

    from cir_core.encoders import load_encoder

    device = "cuda" if config.use_gpu else "cpu"
    if config.pretrained is not None or config.model not in open_clip.list_models():
        return load_encoder(config.model, config.pretrained, device=device)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.safetensors"
        save_file(open_clip.create_model(config.model).state_dict(), weights)
        return load_encoder(config.model, str(weights), device=device)


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
    for name in config.measure:
        say(MEASUREMENTS[name](config).markdown())
    say(surroundings(config))


if __name__ == "__main__":
    run(main)
