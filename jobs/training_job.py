"""The driver of a tuning run: check, find or make the data, plan, run Ray Train, collect, publish."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from rich.console import Console
from rich.table import Table

from cir_core import files, scenes
from cir_core.embedding_store import listing_digest
from cir_core.preprocessing import Preprocessing
from cir_core.reporting.plots import training_curves
from cir_core.schema import REJECT_SCHEMA, CirError
from cir_core.shards import list_shards, shard_versions
from cir_core.tuning import TuningSettings
from jobs import tracking
from jobs.config import flat_parameters, public
from jobs.models import ModelInfo
from jobs.progress import UnitGauge
from jobs.session import check_resources, code_version, say
from jobs.start_up import StartUp
from jobs.storage import CHECK_S, RunFolder, absolute, check_writable, steps_done
from jobs.text_anchors import run_anchors
from jobs.training_data import (
    DECODER_CPUS,
    READER_CPUS,
    PlannedBatches,
    RunPlan,
    describe_large_groups,
    index_shards,
    steps_in_memory,
)
from jobs.training_network import NodesTorchConfig
from jobs.training_stop import run_until_stopped, stop_notice
from jobs.training_worker import LoopSettings, MistakesAreFinal, train_worker

if TYPE_CHECKING:
    from jobs.tat_train import TatTrainConfig

SCENES = "scenes"  # the value of --data that stands for generated pairs
_SHARD_ROWS = 1000  # of the generated shards
# Settings that say where and how often, not what: they may differ when a run is resumed. micro_batch_size is one as
# num_workers is: either changes how many rows pass the tower at once, so which dropout is drawn and how sums are rounded,
# and nothing else; and who resumes with fewer workers or less memory needs both. cache_text_anchors is none of them: an
# anchor agrees with the text tower's answer in training only to rounding (another batch, another kernel), no machine makes
# it necessary, and a run that had changed over would not end in the weights of one that had not been interrupted.
_OPERATIONAL = ("num_workers", "use_gpu", "cpus_per_worker", "checkpoint_every_steps", "log_every_steps",
                "max_failures", "name", "gradient_checkpointing", "micro_batch_size")  # fmt: skip
_TUNING = ("weight_decay", "max_grad_norm", "temperature", "micro_batch_size", "gradient_checkpointing", "patch_dropout",
           "seed")  # fmt: skip


def find_data(config: TatTrainConfig) -> list[str]:
    """Return the shards to train on, generating them first if they are to be scenes."""
    if config.data != SCENES:
        return list_shards(config.data)
    folder = files.join(absolute(config.storage_path), "data", f"scenes-pairs-{config.num_pairs}-seed{config.seed}")
    if not files.exists(files.join(folder, "complete.json")):
        say(f"generating {config.num_pairs} pictures with captions in {folder}")
        write = ray.remote(num_cpus=1)(scenes.write_pairs)
        numbers = range(-(-config.num_pairs // _SHARD_ROWS))
        shared = {"seed": config.seed, "shard_rows": _SHARD_ROWS}
        ray.get([write.remote(folder, config.num_pairs, **shared, only=number) for number in numbers])
        files.write_json(files.join(folder, "complete.json"), {"shards": len(numbers), "pairs": config.num_pairs})
    return list_shards(folder)


def loop_settings(
    config: TatTrainConfig, folder: RunFolder, plan: RunPlan, mlflow_run_id: str, *, start_up: StartUp, first_step: int
) -> LoopSettings:
    """Derive what the workers need."""
    total = plan.epoch(0).num_steps * config.epochs
    tuning = TuningSettings(
        total_steps=total,
        warmup_steps=int(config.warmup_fraction * total),
        precision=config.resolved_precision,
        lr=config.peak_lr,
        **config.model_dump(include=set(_TUNING)),
    )
    loss = {"name": "symmetric contrastive", "temperature": config.temperature, "global_batch_size": config.batch}
    tat = {
        "base_model": config.model,
        "pretrained": config.pretrained,
        "data": public(config.data),
        "steps": total,
        "loss": loss,
        "code_version": code_version(),
        "extra": {"patch_dropout": config.patch_dropout},
    }
    return LoopSettings(
        run_uri=folder.uri,
        train_run_uri=folder.path("state"),
        model=config.model,
        pretrained=config.pretrained,
        lora=config.lora,
        tuning=tuning,
        plan=plan,
        tat=tat,
        tracking_uri=tracking.resolve_uri(config.tracking_uri),
        mlflow_run_id=mlflow_run_id,
        start_up=tuple(start_up.moments),
        first_step=first_step,
        notice=stop_notice(),
        **config.model_dump(include={"checkpoint_every_steps", "log_every_steps", "gap_samples", "record_samples"}),
    )


def train(config: TatTrainConfig, folder: RunFolder, settings: LoopSettings, preprocessing: Preprocessing) -> None:
    """Run Ray Train to the last step; survives workers that die, and leaves a checkpoint when it is told to stop."""
    filesystem, path = files.filesystem(folder.uri)
    resources = {"CPU": config.cpus_per_worker}
    if config.use_gpu:
        resources["GPU"] = 1
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        torch_config=NodesTorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=resources
        ),
        datasets={"train": ray.data.range(1)},  # PlannedBatches makes the data; Ray Train wants a name for it
        dataset_config=PlannedBatches(settings.plan, preprocessing, partial(steps_done, settings.train_run_uri)),
        run_config=RunConfig(
            name="state",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[MistakesAreFinal()],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    # Told here, by checkpoints: a run that waits for workers has none that could say that it waits.
    with UnitGauge("tat_train", "steps", lambda: steps_done(settings.train_run_uri)) as steps:
        steps.show(settings.first_step, settings.tuning.total_steps)
        run_until_stopped(trainer.fit, settings.notice)


def summarise(config: TatTrainConfig, folder: RunFolder, plan: RunPlan) -> dict[str, Any]:
    """Collect what the run's folder says into the final result."""
    training = files.read_json(folder.path("training.json"))
    return {
        "name": folder.name,
        "model": config.model,
        "adapter_uri": folder.path("adapter"),
        "merged_uri": folder.path("merged"),
        "steps": plan.epoch(0).num_steps * config.epochs,
        "samples_seen": training["num_samples"],
        "rejects_structural": sum(len(index.rejects) for index in plan.indexes),
        "rejects_images": training["num_rejects"],
        "trainable_fraction": training["trainable_fraction"],
        "num_parameters": training["num_parameters"],
        "gap_before": training["gap_before"],
        "gap_after": training["gap_after"],
        "history": training["history"],
        "start_up": training.get("start_up", []),
        "process_began": training.get("process_began"),
    }


def publish(tracker: tracking.Tracker, config: TatTrainConfig, folder: RunFolder, result: dict[str, Any]) -> bool:
    """Write everything the run found to MLflow: missing steps, final metrics, plots, adapter, settings."""

    def write() -> None:
        have = tracker.logged_steps("loss")
        series = [(row["step"], {k: v for k, v in row.items() if k != "step"}) for row in result["history"]]
        tracker.log_series([item for item in series if item[0] not in have])
        for moment in ("before", "after"):
            tracker.log_metrics({f"gap_{moment}/{key}": value for key, value in result[f"gap_{moment}"].items()})
        numbers = ("trainable_fraction", "num_parameters", "samples_seen", "rejects_structural", "rejects_images")
        tracker.log_metrics({key: result[key] for key in numbers})
        tracker.log_metrics({f"start_up_s/{stage}": spent for stage, spent in result["start_up"]})
        with tempfile.TemporaryDirectory() as name:
            local = Path(name)
            (local / "settings.json").write_text(config.model_dump_json(indent=2))
            names = ("loss", "lr", "grad_norm", "samples_per_second", "data_wait_share")
            curves = {key: {row["step"]: row[key] for row in result["history"]} for key in names}
            training_curves(curves, title=f"tat_train {result['name']}", path=str(local / "training.png"))
            for item in files.list_files(folder.path("adapter")):
                target = local / "adapter" / item.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(files.read_bytes(item.uri))
            tracker.log_folder(name)
        tracker.tag({"adapter_uri": result["adapter_uri"], "model": result["model"]})
        tracker.finish()

    return tracking.publish(write)


def show(result: dict[str, Any], page: str) -> None:
    """Print the final table."""
    table = Table(title=f"tat_train {result['name']}", show_header=False)
    last = result["history"][-1]
    rows = [
        ("steps", f"{result['steps']}"),
        ("samples seen", f"{result['samples_seen']} ({result['rejects_images']} unreadable images left out)"),
        ("shard rows rejected", f"{result['rejects_structural']}"),
        ("final loss", f"{last['loss']:.4f}"),
        (
            "trainable",
            f"{100 * result['trainable_fraction']:.2f} % of {result['num_parameters'] / 1e6:.1f} M parameters",
        ),
    ]
    for key, before in result["gap_before"].items():
        rows.append((f"gap: {key}", f"{before:.3f} -> {result['gap_after'][key]:.3f}"))
    rows += [
        ("adapter", public(result["adapter_uri"])),
        ("merged weights", public(result["merged_uri"])),
        ("MLflow", page),
    ]
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def list_structural_rejects(folder: RunFolder, plan: RunPlan) -> None:
    """Write the rows that are in no step: they are no pairs. Images that cannot be read are listed as their steps come."""
    uri = folder.path("rejects", "structural.parquet")
    rejects = [asdict(reject) for index in plan.indexes for reject in index.rejects]
    if rejects and not files.exists(uri):
        files.write_parquet(uri, pa.Table.from_pylist(rejects, REJECT_SCHEMA))


def report_rejects(folder: RunFolder) -> None:
    """Say which rows and images were left out and why, the commonest reasons first."""
    if not files.exists(folder.path("rejects")):
        return
    reasons: dict[str, int] = {}
    for item in files.list_files(folder.path("rejects")):
        with files.open_parquet(item.uri, "rejects") as file:
            for reason in file.read(["reason"])["reason"].to_pylist():
                reasons[reason] = reasons.get(reason, 0) + 1
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    say(f"left out, see {folder.path('rejects')}: {counts}")


def start_tracking(config: TatTrainConfig, folder: RunFolder, uri: str) -> tracking.Tracker:
    """Open the run's MLflow run: the one its folder names, or a new one."""
    recorded = folder.path("mlflow.json")
    tracker = tracking.Tracker.start(
        uri,
        experiment=config.experiment,
        name=folder.name,
        parameters=flat_parameters(config)
        | {"run_folder": folder.uri, "resolved_batch_size": config.batch, "resolved_lr": config.peak_lr},
        tags={"job": "tat_train", "code_version": code_version()},
        run_id=files.read_json(recorded)["run_id"] if files.exists(recorded) else None,
    )
    files.write_json(recorded, {"run_id": tracker.run_id})
    return tracker


def claimed_folder(config: TatTrainConfig, model: ModelInfo) -> tuple[RunFolder, dict[str, Any]]:
    """Return the run's folder and the settings to claim it with.

    Raises:
        CirError: the folder is that of a run with other settings.
    """
    name = config.name or f"{config.model.replace('/', '-').replace(':', '-')}-{config.digest(_OPERATIONAL)}"
    folder = RunFolder(config.storage_path, "tat_train", name)
    settings = config.model_dump(mode="json", exclude={*_OPERATIONAL, "tracking_uri", "experiment", "storage_path"})
    settings["weights_digest"] = model.details.weights_digest
    if files.exists(folder.path("settings.json")):
        folder.claim(settings)
    return folder, settings


def check_same_data(folder: RunFolder, shards: Sequence[str]) -> None:
    """Record which shards a run began with, or check that a resumed run still has them.

    Raises:
        CirError: a shard was added, removed or written again since; the plan of the epoch would be another.
    """
    recorded, digest = folder.path("data.json"), listing_digest(shard_versions(shards))
    if not files.exists(recorded):
        files.write_json(recorded, {"listing_digest": digest})
    elif files.read_json(recorded)["listing_digest"] != digest:
        raise CirError(
            f"the shards have changed since run {folder.name} began (added, removed or written again), so it cannot go on "
            "where it stopped; put them back, or choose another --name"
        )


def tune(config: TatTrainConfig, checking: ray.ObjectRef[ModelInfo], start_up: StartUp) -> None:
    """Check everything, then tune, then publish. checking: the model, as `inspect_model` will describe it."""
    uri = tracking.resolve_uri(config.tracking_uri)
    tracking.check_server(uri)
    check_writable(absolute(config.storage_path), "storage_path")
    if config.data != SCENES:
        with files.patience(CHECK_S):
            list_shards(config.data)
    start_up.reached("checks")
    model = ray.get(checking)
    start_up.reached("model checked")
    folder, settings = claimed_folder(config, model)
    result = folder.result()
    if result and result.get("published"):
        say(f"run {folder.name} is already finished: {folder.uri}")
        show(result, result["page"])
        return
    if not result:
        gang = {"CPU": config.cpus_per_worker * config.min_workers + READER_CPUS + DECODER_CPUS}
        check_resources(gang | ({"GPU": float(config.min_workers)} if config.use_gpu else {}))
    shards = find_data(config)
    indexes = tuple(index_shards(shards, absolute(config.storage_path)))
    plan = RunPlan(indexes, config.batch, config.seed, config.epochs, steps_in_memory(indexes, config.batch))
    steps, done = plan.epoch(0).num_steps * config.epochs, steps_done(folder.path("state"))
    folder.claim(settings)
    check_same_data(folder, shards)
    start_up.reached("data")
    tracker = start_tracking(config, folder, uri)
    list_structural_rejects(folder, plan)
    start_up.reached("tracking")
    going_on = f", going on after step {done}" if done else ""
    say(f"run {folder.name}: {plan.num_rows} pairs in {len(shards)} shards, {steps} steps of {config.batch}{going_on}")
    if not result and (slow := describe_large_groups(plan.epoch(0))):
        say(slow)
    say(f"MLflow: {tracker.page}")
    if not result:
        try:
            plan = replace(plan, anchors=run_anchors(config, folder, model, plan.indexes))
            told = loop_settings(config, folder, plan, tracker.run_id, start_up=start_up, first_step=done)
            train(config, folder, told, model.preprocessing)
        except BaseException:
            tracking.publish(lambda: tracker.finish("FAILED"), patience_s=5)
            raise
        result = summarise(config, folder, plan)
        folder.commit(result)
    page = tracker.page
    folder.commit(result | {"published": publish(tracker, config, folder, result), "page": page})
    report_rejects(folder)
    show(result, page)
