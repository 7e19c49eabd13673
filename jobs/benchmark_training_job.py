"""What the Ray job adds to its training step: tat_train.py beside a bare loop of the same step with its data in memory.

Called by jobs/benchmark.py; starts a local Ray cluster where none runs. The job keeps its MLflow runs in a file of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cir_core import files
from cir_core.preprocessing import Preprocessing, preprocess_image
from cir_core.schema import CirError
from cir_core.shards import Sample, list_shards, read_shard
from jobs.benchmark_embedding import saved_model, write_photos
from jobs.session import connect, say
from jobs.start_up import StartUp

if TYPE_CHECKING:
    from cir_core.tuning import TextAnchoredTuner
    from jobs.benchmark import BenchmarkConfig
    from jobs.benchmark_rivals import Batch
    from jobs.benchmark_training import Measured

_DROPPED_STEPS = 3  # of a job and of the bare loop, where both are still starting
_FEWEST_STEPS = 8
_COUNTED_STEPS = 8  # of the bare loop
_DECODED = 32  # images whose decoding is timed


@dataclass(frozen=True)
class Steady:
    """A job's steps after the first ones: samples per second, and the share of the time that it waited for data."""

    samples_per_second: float
    data_wait_share: float


def steady(history: Sequence[Mapping[str, Any]], batch_size: int) -> Steady:
    """Sum up a job's history of a row for each step, without the first steps and the last, which may not be full.

    Raises:
        CirError: too few steps.
    """
    rows = history[_DROPPED_STEPS:-1]
    if len(history) < _FEWEST_STEPS:
        raise _too_few(len(history))
    seconds = [batch_size / row["samples_per_second"] for row in rows]
    waited = sum(row["data_wait_share"] * spent for row, spent in zip(rows, seconds, strict=True))
    return Steady(len(rows) * batch_size / sum(seconds), waited / sum(seconds))


def _too_few(num_steps: int) -> CirError:
    return CirError(
        f"training_job: {num_steps} steps; a rate needs at least {_FEWEST_STEPS}: use more images or a smaller batch"
    )


def run_job(
    config: BenchmarkConfig, *, name: str, home: Path, data: str, model: str, weights: str | None
) -> list[dict[str, Any]]:
    """Run tat_train.py's job to its end in the connected cluster; return its history, a row for each step."""
    from jobs.models import inspect_model
    from jobs.storage import RunFolder
    from jobs.tat_train import TatTrainConfig
    from jobs.training_job import tune

    settings = {
        "name": name,
        "data": data,
        "model": model,
        "pretrained": weights,
        "storage_path": str(home / "storage"),
        "tracking_uri": f"sqlite:///{home}/mlflow.db",
        "global_batch_size": config.batch_size,
        "log_every_steps": 1,
        "gap_samples": config.batch_size,
        "use_gpu": config.use_gpu,
    }
    job = TatTrainConfig.model_validate(settings)
    with contextlib.chdir(home):  # where MLflow puts the artifacts of runs that are kept in a file
        tune(job, inspect_model.remote(model, weights, lora=job.lora, patch_dropout=job.patch_dropout), StartUp())
    result = files.read_json(RunFolder(job.storage_path, "tat_train", name).path("result.json"))
    history: list[dict[str, Any]] = result["history"]
    return history


def bare_loop(tuner: TextAnchoredTuner, batch: Batch, steps: int) -> tuple[float, float]:
    """Do `steps` steps from captions, the first ones not counted; return samples per second and per CPU-second."""
    for number in range(_DROPPED_STEPS):
        tuner.step(number, batch.images, batch.captions, batch.valid)
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(steps):
        float(tuner.step(number, batch.images, batch.captions, batch.valid).loss)  # waits for a GPU
    samples = steps * len(batch.images)
    return samples / (time.perf_counter() - wall), samples / (time.process_time() - cpu)


def decode_cpu_seconds(shard: str, preprocessing: Preprocessing) -> float:
    """Return the CPU time of reading and decoding one image of a shard, the mean of the first ones."""
    started = time.process_time()
    rows = [row for row in itertools.islice(read_shard(shard), _DECODED) if isinstance(row, Sample)]
    for row in rows:
        preprocess_image(row.image, preprocessing)
    return (time.process_time() - started) / max(1, len(rows))


def measure_training_job(config: BenchmarkConfig) -> Measured:
    """The job against the bare loop, in turns: samples per second of steady steps, and the job's waiting for data."""
    import torch

    from jobs.benchmark_rivals import make_tuner
    from jobs.benchmark_training import set_up

    if not config.data and config.images < _FEWEST_STEPS * config.batch_size:
        raise _too_few(config.images // config.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        data = config.data or files.join(folder, "photos")
        if not config.data:
            write_photos(data, config.images, side=config.side)
        model, weights = saved_model(config, home)
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as a training worker that is alone on its node has
        setting = set_up(config)
        tuner = make_tuner(setting.encoder, setting.settings)
        connect()
        jobs: list[Steady] = []
        bare: list[tuple[float, float]] = []

        def job(name: str) -> None:
            history = run_job(config, name=name, home=home, data=data, model=model, weights=weights)
            jobs.append(steady(history, config.batch_size))

        def loop(_: str) -> None:
            bare.append(bare_loop(tuner, setting.batch, _COUNTED_STEPS))

        for number in range(config.rounds):
            for turn in (job, loop) if number % 2 else (loop, job):
                turn(f"round-{number}")
            say(
                f"round {number + 1}/{config.rounds}: tat_train.py {jobs[-1].samples_per_second:.2f} samples/s, waiting for data "
                f"{100 * jobs[-1].data_wait_share:.1f} %; bare loop {bare[-1][0]:.2f} samples/s"
            )
        decode_s = decode_cpu_seconds(list_shards(data)[0], setting.encoder.preprocessing)
    return report(config, f"{setting.about}, from captions", jobs=jobs, bare=bare, decode_s=decode_s)


def report(
    config: BenchmarkConfig, about: str, *, jobs: Sequence[Steady], bare: Sequence[tuple[float, float]], decode_s: float
) -> Measured:
    """Make the table. bare: samples per second and per CPU-second of each round; decode_s: CPU time of an image."""
    from jobs.benchmark_training import Measured, ratios

    rates = [job.samples_per_second for job in jobs]
    found = ratios(rates, [rate for rate, _ in bare])
    wait = statistics.median(job.data_wait_share for job in jobs)
    decode_share = decode_s * statistics.median(per_cpu for _, per_cpu in bare)
    metrics = {
        "training_job/samples_per_second": statistics.median(rates),
        "training_job/bare_samples_per_second": statistics.median(rate for rate, _ in bare),
        "training_job/over_bare": statistics.median(found),
        "training_job/data_wait_share": wait,
        "training_job/decode_over_step_cpu": decode_share,
    }
    source = config.data or f"{config.images} generated JPEG photographs of {config.side} pixels"
    notes = (
        f"{about} on the bare side; the job's: {source}. Both as in tat_train.py with one worker. Steps of the job after "
        f"the first {_DROPPED_STEPS}. Reading and decoding take {100 * decode_share:.1f} % of a step's CPU time, on the same "
        "cores, and in a short run most of it happens before the first step."
    )
    lines = [
        f"| median of {len(rates)} rounds | samples/s | job / this | waiting for data |",
        "|---|---|---|---|",
        f"| tat_train.py | {metrics['training_job/samples_per_second']:.2f} | 1 | {100 * wait:.1f} % |",
        f"| bare loop | {metrics['training_job/bare_samples_per_second']:.2f} | {statistics.median(found):.2f} "
        f"[{found[0]:.2f}, {found[-1]:.2f}] | - |",
    ]
    return Measured("\n".join(["### Training job", "", notes, "", *lines, ""]), metrics)
