"""Pre-train the small CLIP that ships in cir_core/models/scenes-tiny, on generated scenes: half an hour on two cores.

    python jobs/pretrain_scenes.py --output cir_core/models/scenes-tiny

Writes open_clip_config.json, open_clip_model.safetensors, the tokenizer, and TRAINING.md with the command, seed and
versions. Needs neither Ray nor MLflow: it is run once, by whoever changes the generator or the architecture.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from cir_core.encoders import load_encoder
from cir_core.modality_gap import modality_gap
from cir_core.scenes.pretraining import PretrainSettings, pairs, pretrain
from cir_core.schema import CirError
from jobs.config import JobConfig, parse_config
from jobs.session import code_version, run, say

_CHUNK = 1000
_HELD_OUT = 2000  # pairs after the training pairs, for the figures in TRAINING.md
_DEFAULT = PretrainSettings()


class PretrainConfig(JobConfig):
    """Settings of the pre-training; together with the torch version they decide the weights."""

    output: str = Field("", description="Folder for the model; must be empty or absent.")
    num_pairs: PositiveInt = Field(_DEFAULT.num_pairs, description="Generated pairs.")
    steps: PositiveInt = Field(_DEFAULT.steps, description="Optimiser steps.")
    batch_size: PositiveInt = Field(_DEFAULT.batch_size, description="Pairs per step.")
    lr: PositiveFloat = Field(_DEFAULT.lr, description="Peak learning rate.")
    seed: int = Field(_DEFAULT.seed, description="Seeds pairs, initial weights and batches.")


def main() -> None:
    """Generate, train, measure on held-out pairs, and write it all down."""
    config = parse_config(PretrainConfig, "pretrain_scenes", __doc__.split("\n")[0])
    if not config.output:
        raise CirError("--output is needed: a folder for the model")
    folder = Path(config.output)
    if folder.exists() and any(folder.iterdir()):
        raise CirError(f"--output {folder} is not empty; remove it first to train anew")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    total = config.num_pairs + _HELD_OUT
    starts = range(0, total, _CHUNK)
    with ProcessPoolExecutor() as pool:
        chunks = list(pool.map(pairs, [config.seed] * len(starts), starts, [min(s + _CHUNK, total) for s in starts]))
    images = torch.from_numpy(np.concatenate([chunk[0] for chunk in chunks]))
    captions = [caption for chunk in chunks for caption in chunk[1]]
    say(f"{total} pictures generated in {time.perf_counter() - started:.0f} s")

    def report(step: int, measured: dict[str, float]) -> None:
        rate = step * config.batch_size / (time.perf_counter() - started)
        values = "  ".join(f"{key} {value:.3f}" for key, value in measured.items())
        say(f"step {step}/{config.steps}  {values}  {rate:.0f} pairs/s")

    names = {"num_pairs", "steps", "batch_size", "lr", "seed"}
    pretrain(
        images[: config.num_pairs],
        captions[: config.num_pairs],
        folder,
        PretrainSettings(**config.model_dump(include=names)),
        report,
    )
    figures = measure(folder, images[config.num_pairs :], captions[config.num_pairs :])
    lines = [
        "# scenes-tiny: how these weights were made",
        "",
        f"    python {' '.join(sys.argv)}",
        "",
        f"Settings: {config.model_dump_json(include=names)}",
        f"Code {code_version()}, torch {torch.__version__}, open_clip {open_clip.__version__}, "
        f"{torch.get_num_threads()} threads, {time.perf_counter() - started:.0f} s.",
        f"On {_HELD_OUT} held-out pairs: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()) + ".",
    ]
    (folder / "TRAINING.md").write_text("\n".join(lines) + "\n")
    say("\n".join(lines[4:]))


def measure(folder: Path, images: torch.Tensor, captions: list[str]) -> dict[str, float]:
    """Return retrieval accuracy and modality gap of the saved model on pairs it has not seen."""
    encoder = load_encoder(f"local-dir:{folder.absolute()}", device="cpu")
    image = torch.cat([encoder.encode_images(part) for part in torch.split(images, 256)])
    text = encoder.encode_texts(captions)
    right = ((image @ text.T).argmax(1) == torch.arange(len(captions))).float().mean().item()
    return {"image_to_text_recall@1": right, **asdict(modality_gap(image, text))}


if __name__ == "__main__":
    run(main)
