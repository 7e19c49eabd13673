"""What one Ray Train worker does: restore, step through its batches, checkpoint, and save the result.

State is one safetensors file per checkpoint, written whole or not at all, in `<run>/state/step-NNNNNNNN/`; the newest
one is where a run goes on, after any death. Rejects and, on request, the samples seen are written just before it, in
files named by step, so that a step done again after a failure overwrites what the lost one wrote.
"""

from __future__ import annotations

import logging
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode

from cir_core import files
from cir_core.encoders import load_encoder
from cir_core.encoders.two_tower import OpenClipEncoder
from cir_core.epoch_plan import Piece
from cir_core.lora import TatMetadata, attach_lora, export_merged, save_adapter
from cir_core.losses import all_gather_with_grad
from cir_core.modality_gap import modality_gap
from cir_core.preprocessing import ImageError, preprocess_image
from cir_core.schema import REJECT_SCHEMA, CirError
from cir_core.tuning import StepResult, TextAnchoredTuner
from jobs.progress import StageMetrics
from jobs.session import node_cpus, say
from jobs.start_up import StartUp
from jobs.storage import STATE, forget_after
from jobs.tracking import LiveMetrics
from jobs.training_data import Batches, read_pairs
from jobs.training_stop import EarlyCheckpoints
from jobs.training_worker import LoopSettings

_GAP_BATCH = 256


@dataclass
class _Interval:
    """What this rank gathered since the last checkpoint. samples: only filled if they are to be recorded."""

    num_samples: int = 0
    rejects: list[dict[str, str]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: int, info: dict[str, Any], *, record: bool) -> None:
        """Take in one batch's bookkeeping."""
        self.num_samples += len(info["key"])
        self.rejects += info["rejects"]
        if record:
            pairs = zip(info["shard"], info["key"], strict=True)
            self.samples += [{"step": step, "shard": shard, "key": key} for shard, key in pairs]


def tune(settings: LoopSettings, batches: Batches, steps_done: int, state_uri: str | None, start_up: StartUp) -> None:
    """Go on after `steps_done` steps to the last one, from the state at `state_uri`, and save the result."""
    for name in ("", "mlflow"):  # Ray turns the root logger up to INFO, and open_clip and MLflow talk to it
        logging.getLogger(name).setLevel(logging.WARNING)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, node_cpus() // context.get_local_world_size()))
    torch.manual_seed(settings.tuning.seed)  # the adapter's start, the same on every rank
    encoder = load_encoder(settings.model, settings.pretrained, device=str(device), precision=settings.tuning.precision)
    report = attach_lora(encoder.model, **settings.lora)
    encoder.model.to(device)
    tuner = TextAnchoredTuner(
        encoder,
        settings.tuning,
        rank=rank,
        gather=all_gather_with_grad if world > 1 else None,
        wrap=lambda module: ray.train.torch.prepare_model(module) if world > 1 else module,
    )
    if settings.plan.anchors is not None:
        tuner.drop_text_tower()  # nothing needs it before the merged weights are written, and they are made of a new copy
    memory: dict[str, Any] = {"history": [], "trainable_fraction": report.fraction, "num_parameters": report.total}
    if state_uri is not None:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / STATE
            local.write_bytes(files.read_bytes(state_uri))
            memory = tuner.load_state(str(local))
    start_up.reached("model")
    live = LiveMetrics(settings.tracking_uri, settings.mlflow_run_id, marker="loss") if rank == 0 else None
    if rank == 0 and steps_done == settings.first_step:
        batches = _telling(start_up, batches, memory)
    try:
        if steps_done < settings.tuning.total_steps:
            _run_steps(settings, tuner, memory, batches, steps_done, live)
        if rank == 0:
            _save_result(settings, encoder, memory)
    finally:
        if live is not None:
            live.close()
    if world > 1:
        dist.barrier()


def _telling(start_up: StartUp, batches: Batches, memory: dict[str, Any]) -> Batches:
    """Yield the batches; after the first one's step say how long the start took, and keep it."""
    for first in batches:
        start_up.reached("first batch")
        yield first
        start_up.reached("first step")
        memory |= start_up.record()
        say(f"first step after {start_up}")
        break
    yield from batches


def _run_steps(
    settings: LoopSettings,
    tuner: TextAnchoredTuner,
    memory: dict[str, Any],
    batches: Batches,
    first: int,
    live: LiveMetrics | None,
) -> None:
    """Steps `first` to the end, with a checkpoint every checkpoint_every_steps, before an interruption, after the last."""
    total = settings.tuning.total_steps
    interval, waited, started, begun = _Interval(), 0.0, time.perf_counter(), time.perf_counter()
    exported = StageMetrics("tat_train", "rows", "rejects")
    if live is not None:  # rank 0
        forget_after(settings.run_uri, first)
    early = EarlyCheckpoints(settings.notice, first)
    asked = time.perf_counter()
    for index, (arrays, info) in enumerate(batches, start=first):
        got = time.perf_counter()
        waited += got - asked
        images, valid = (torch.from_numpy(arrays[key].copy()) for key in ("images", "valid"))  # Ray's are read-only
        texts = torch.from_numpy(arrays["anchors"].copy()) if "anchors" in arrays else info["texts"]
        result = tuner.step(index, images, texts, valid)
        interval.add(index, info, record=settings.record_samples)
        done = index + 1
        if not torch.isfinite(result.grad_norm):  # the same on every rank, and before anything of it is kept
            raise CirError(
                f"the gradients of step {done} are not finite, training has diverged; the last checkpoint is sound. Use a "
                f"smaller --lr (now {settings.tuning.lr:g}) or a larger --temperature, under a --name of its own"
            )
        exported.count("rows", len(info["key"]) - len(info["rejects"]))
        exported.count("rejects", len(info["rejects"]))
        exported.stage("data_wait", got - asked)
        exported.stage("step", time.perf_counter() - got)
        if done % settings.log_every_steps == 0 or done == total:
            elapsed = time.perf_counter() - started
            samples = steps_to_log(done, first, settings.log_every_steps) * settings.plan.global_batch_size
            row = _measured(result, settings, elapsed=elapsed, waited=waited, samples=samples)
            if live is not None:
                memory["history"].append({"step": done, **row})
                live.log(done, row)
                eta = (time.perf_counter() - begun) / (done - first) * (total - done)
                say(
                    f"step {done}/{total} ({100 * done / total:.0f} %)  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                    f"{row['samples_per_second']:.0f} samples/s  data wait {100 * row['data_wait_share']:.0f} %  "
                    f"ETA {eta:.0f} s"
                )
            waited, started = 0.0, time.perf_counter()
        if early.due(done) or done % settings.checkpoint_every_steps == 0 or done == total:
            with exported.measured("checkpoint"):
                _checkpoint(settings, tuner, memory, done, interval)
            early.written(done)
            interval = _Interval()
        asked = time.perf_counter()


def steps_to_log(done: int, first: int, every: int) -> int:
    """Return the steps since the last line: one is written after each multiple of `every`, and after the last step."""
    return done - max(first, (done - 1) // every * every)


def _measured(
    result: StepResult, settings: LoopSettings, *, elapsed: float, waited: float, samples: int
) -> dict[str, float]:
    loss = result.loss.float().clone()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        dist.all_reduce(loss)
        loss /= world
    return {
        "loss": float(loss),
        "lr": result.lr,
        "temperature": settings.tuning.temperature,
        "grad_norm": float(result.grad_norm),
        "samples_per_second": samples / elapsed,
        "data_wait_share": min(1.0, waited / elapsed),
        "num_workers": world,
    }


def _checkpoint(
    settings: LoopSettings, tuner: TextAnchoredTuner, memory: dict[str, Any], done: int, interval: _Interval
) -> None:
    """Commit `done` steps: rejects and samples first, then the state file, then Ray Train is told."""
    gathered: list[Any] = [interval]
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, interval)
    name = f"step-{done:08d}"
    checkpoint = None
    if ray.train.get_context().get_world_rank() == 0:
        rejects = [reject for part in gathered for reject in part.rejects]
        memory["num_rejects"] = memory.get("num_rejects", 0) + len(rejects)
        memory["num_samples"] = memory.get("num_samples", 0) + sum(part.num_samples for part in gathered)
        if rejects:
            table = pa.Table.from_pylist(rejects, schema=REJECT_SCHEMA)
            files.write_parquet(files.join(settings.run_uri, "rejects", f"{name}.parquet"), table)
        if settings.record_samples:
            table = pa.Table.from_pylist([sample for part in gathered for sample in part.samples])
            files.write_parquet(files.join(settings.run_uri, "samples", f"{name}.parquet"), table)
        folder = files.join(settings.train_run_uri, name)
        files.write_bytes(files.join(folder, STATE), tuner.state_bytes({**memory, "step": done}))
        filesystem, path = files.filesystem(folder)
        checkpoint = Checkpoint(path, filesystem)
    ray.train.report(
        {"step": done},
        checkpoint=checkpoint,
        checkpoint_dir_name=name,
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )


def measure_gaps(encoder: OpenClipEncoder, settings: LoopSettings) -> dict[str, dict[str, float]]:
    """Measure the modality gap without and with the adapter, on the first `gap_samples` readable pairs of the plan's slices.

    Returns "gap_before" and "gap_after". Leaves the model in eval mode.
    """
    images: list[torch.Tensor] = []
    texts: list[str] = []
    anchors: list[torch.Tensor] = []
    size = settings.gap_samples  # at a time; a slice may be as large as a file
    for piece in (
        Piece(part, first, min(first + size, part.num_rows))
        for part in settings.plan.epoch(0).slices
        for first in range(0, part.num_rows, size)
    ):
        if len(images) == settings.gap_samples:
            break
        samples, vectors = read_pairs(piece, settings.plan.anchors)
        for index, sample in enumerate(samples):
            if len(images) == settings.gap_samples:
                break
            try:
                images.append(torch.from_numpy(preprocess_image(sample.image, encoder.preprocessing)))
            except ImageError:
                continue
            texts.append(sample.caption)
            if vectors is not None:
                anchors.append(torch.from_numpy(vectors[index].copy()))
    encoder.model.eval()
    batches = [torch.stack(images[start : start + _GAP_BATCH]) for start in range(0, len(images), _GAP_BATCH)]
    text_ND = torch.stack(anchors).to(encoder.device) if anchors else encoder.encode_texts(texts)
    gaps = {}
    for moment, adapter in (("before", encoder.model.visual.disable_adapter()), ("after", nullcontext())):
        with adapter:
            image_ND = torch.cat([encoder.encode_images(batch) for batch in batches])
        gaps[f"gap_{moment}"] = asdict(modality_gap(image_ND, text_ND))
    return gaps


def _save_result(settings: LoopSettings, encoder: OpenClipEncoder, memory: dict[str, Any]) -> None:
    """Write `<run>/adapter`, `<run>/merged` and `<run>/training.json`; the same files when done again."""
    memory |= measure_gaps(encoder, settings)
    about: dict[str, Any] = {"weights_digest": encoder.details.weights_digest, "quick_gelu": encoder.details.quick_gelu}
    tat = TatMetadata(**settings.tat, **about)
    with tempfile.TemporaryDirectory() as folder:
        adapter, merged = Path(folder) / "adapter", Path(folder) / "merged"
        save_adapter(encoder.model, adapter, tat)
        if settings.plan.anchors is not None:  # this copy has no text tower; the weights must be those it began with
            encoder = load_encoder(settings.model, settings.pretrained, adapter, "cpu", "fp32")
        export_merged(encoder.model, merged, model_cfg=encoder.model_cfg, tokenizer=encoder.tokenizer)
        for source in (merged, adapter):
            upload(source, files.join(settings.run_uri, source.name))
    files.write_json(files.join(settings.run_uri, "training.json"), memory)


def upload(folder: Path, uri: str) -> None:
    """Copy every file of a local folder to a URI."""
    for source in sorted(folder.rglob("*")):
        if source.is_file():
            files.write_bytes(files.join(uri, *source.relative_to(folder).parts), source.read_bytes())
