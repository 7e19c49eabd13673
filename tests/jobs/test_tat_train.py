"""tat_train on a real cluster: the same result alone, with two workers, and after the death of a worker or the driver."""

import hashlib
import json
import signal
import subprocess
import time

import mlflow
import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from cir_core.encoders import load_encoder
from cir_core.lora import TatMetadata
from cir_core.scenes import write_benchmark, write_pairs
from cir_core.shards import write_tar_shard

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NUM_PAIRS, BATCH = 1000, 16
STEPS = 63  # 1000 / 16, rounded up


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Good pairs, one whose image cannot be decoded, and one that is not even a pair."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(str(folder), NUM_PAIRS - 1, shard_rows=300)
    bad = [("html", b"<html>not found</html>", "jpg", "a page"), ("empty", b"", "jpg", "nothing")]
    write_tar_shard(str(folder / "00004.tar"), bad)
    return folder


def arguments(pairs, model, name, /, **changed):
    settings = {
        "data": str(pairs),
        "model": f"local-dir:{model}",
        "name": name,
        "global_batch_size": BATCH,
        "gap_samples": 64,
        "checkpoint_every_steps": 8,
        "log_every_steps": 1,
        "record_samples": "true",
        "lr": 1e-3,
        "lora_dropout": 0,  # each worker draws its own, so with it two do not equal one
        **changed,
    }
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


class Run:
    """What a run left in its folder."""

    def __init__(self, servers, name):
        self.folder = servers.storage / "tat_train" / name
        self.result = json.loads((self.folder / "result.json").read_text())
        self.adapter = hashlib.sha256((self.folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        files = sorted((self.folder / "samples").glob("*.parquet"))
        self.samples = [tuple(row.values()) for file in files for row in pq.read_table(file).to_pylist()]

    def check_every_sample_once(self):
        seen = [(shard, key) for _, shard, key in self.samples]
        assert len(seen) == len(set(seen)) == NUM_PAIRS
        assert {step for step, _, _ in self.samples} == set(range(STEPS))
        assert self.result["steps"] == STEPS
        assert (self.result["rejects_images"], self.result["rejects_structural"]) == (1, 1)
        listed = [row for path in (self.folder / "rejects").iterdir() for row in pq.read_table(path).to_pylist()]
        assert sorted(row["key"] for row in listed) == ["empty", "html"]


@pytest.fixture(scope="module")
def uninterrupted(servers, pairs, tiny_model_dir):
    done = servers.run_alone("tat_train", *arguments(pairs, tiny_model_dir, "whole"))
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(servers, "whole"), done.stdout


def test_a_run_leaves_what_it_promises(servers, pairs, tiny_model_dir, uninterrupted):
    run, printed = uninterrupted
    run.check_every_sample_once()
    assert f"step {STEPS}/{STEPS} (100 %)" in printed
    assert "unreadable: 1" in printed
    tat = TatMetadata.read(run.folder / "adapter")
    assert (tat.steps, tat.base_model) == (STEPS, f"local-dir:{tiny_model_dir}")
    tuned = load_encoder(f"local-dir:{tiny_model_dir}", adapter=run.folder / "adapter")
    merged = load_encoder(f"local-dir:{run.folder / 'merged'}")
    texts = ["a red circle", "make it blue"]
    assert (tuned.encode_texts(texts) - merged.encode_texts(texts)).abs().max() < 1e-5

    client = mlflow.MlflowClient(servers.tracking_uri)
    logged = client.get_run(run.result["page"].rsplit("/", 1)[-1])
    assert logged.info.status == "FINISHED"
    assert [item.step for item in client.get_metric_history(logged.info.run_id, "loss")] == list(range(1, STEPS + 1))
    wanted = {"loss", "lr", "temperature", "samples_per_second", "data_wait_share", "grad_norm", "trainable_fraction"}
    gap = {f"gap_{moment}/centroid_distance" for moment in ("before", "after")}
    start_up = {f"start_up_s/{stage}" for stage in ("model", "first batch", "first step", "total")}
    assert wanted | gap | start_up <= set(logged.data.metrics)
    stages = dict(run.result["start_up"])
    assert 0 < stages["first step"] < stages["total"]
    assert "first step after" in printed
    assert any(name.startswith("system/") for name in logged.data.metrics)
    assert logged.data.params["r"] == "16"
    artifacts = {item.path for item in client.list_artifacts(logged.info.run_id)}
    assert {"adapter", "training.png", "settings.json"} <= artifacts


def test_the_same_command_again_is_finished_at_once(servers, pairs, tiny_model_dir, uninterrupted):
    again = servers.run("tat_train", *arguments(pairs, tiny_model_dir, "whole"))
    assert again.returncode == 0
    assert "already finished" in again.stdout
    assert Run(servers, "whole").adapter == uninterrupted[0].adapter


def test_retrieval_finds_the_newest_adapter(servers, tiny_model_dir, uninterrupted, tmp_path):
    write_benchmark(str(tmp_path), "test", 7)  # a gallery of 77, more than the deepest metric needs
    found = servers.run(
        "batch_retrieve",
        "--root",
        str(tmp_path),
        "--select_split",
        "",
        "--alphas",
        "[0.8]",
        "--contact_sheet_rows",
        "3",
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert "adapter of tat_train run" in found.stdout
    assert "after TAT" in found.stdout


def test_a_name_with_other_settings_is_refused(servers, pairs, tiny_model_dir, uninterrupted):
    refused = servers.run("tat_train", *arguments(pairs, tiny_model_dir, "whole", lr=0.5))
    assert refused.returncode == 2
    assert "lr: 0.001 -> 0.5" in refused.stderr


def test_two_workers_equal_one(servers, pairs, tiny_model_dir, uninterrupted):
    """Same global batches, so same losses; also in micro-batches. A range of workers takes as many as there is room for."""
    changed = {"num_workers": "[1, 2]", "cpus_per_worker": 0.25, "micro_batch_size": 3}
    done = servers.run("tat_train", *arguments(pairs, tiny_model_dir, "elastic", **changed))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = uninterrupted[0], Run(servers, "elastic")
    assert [{row["num_workers"] for row in run.result["history"]} for run in (one, two)] == [{1}, {2}]
    assert [row["loss"] for row in two.result["history"]] == pytest.approx(
        [row["loss"] for row in one.result["history"]], abs=1e-5
    )
    weights = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (one, two)]
    for name, value in weights[0].items():
        assert weights[1][name] == pytest.approx(value, abs=1e-5)
    assert sorted(one.samples) == sorted(two.samples)


def wait_for_step(servers, process, name, step):
    """Wait until a running process has checkpointed `step`."""
    state = servers.storage / "tat_train" / name / "state"
    deadline = time.monotonic() + 240
    while not any(int(path.parent.name[5:]) >= step for path in state.glob("step-*/state.safetensors")):
        assert process.poll() is None, (servers.storage / f"{name}.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def train_workers():
    """Return the training workers of the tests' cluster; Ray puts its own title in place of their command line."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if "ray::RayTrainWorker" in " ".join(process.info["cmdline"] or [])]


@pytest.mark.long
def test_a_run_that_is_stopped_leaves_a_checkpoint(servers, pairs, tiny_model_dir, uninterrupted):
    """None is due before the run's end; the same command ends in the weights of a run that was left alone."""
    given = arguments(pairs, tiny_model_dir, "stopped", checkpoint_every_steps=1000)
    log = servers.storage / "stopped.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            servers.command("tat_train", *given),
            env=servers.environment(),
            cwd=servers.storage,
            stdout=output,
            stderr=output,
        )
    deadline = time.monotonic() + 240
    while "step 5/" not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    (state,) = (servers.storage / "tat_train" / "stopped" / "state").glob("step-*/state.safetensors")
    step = int(state.parent.name[5:])
    assert 5 <= step < STEPS
    assert f"the checkpoint of step {step} is written" in log.read_text()
    assert "stopped by SIGTERM; the same command continues where this one stopped" in log.read_text()
    done = servers.run("tat_train", *given)
    assert f"going on after step {step}" in done.stdout
    run = Run(servers, "stopped")
    run.check_every_sample_once()
    assert run.adapter == uninterrupted[0].adapter


@pytest.mark.long
def test_a_killed_worker_and_a_killed_driver_change_nothing(servers, pairs, tiny_model_dir, uninterrupted):
    given = arguments(pairs, tiny_model_dir, "killed")
    with (servers.storage / "killed.log").open("w") as log:
        process = subprocess.Popen(
            servers.command("tat_train", *given), env=servers.environment(), cwd=servers.storage, stdout=log, stderr=log
        )
    wait_for_step(servers, process, "killed", 8)
    victims = train_workers()
    assert victims
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    wait_for_step(servers, process, "killed", 32)  # a new worker went on
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (servers.storage / "tat_train" / "killed" / "result.json").exists()
    done = servers.run("tat_train", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on after step" in done.stdout
    run = Run(servers, "killed")
    run.check_every_sample_once()
    assert run.adapter == uninterrupted[0].adapter


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "ViT-B-23"}, "ViT-B-32"),
        ({"model": "ViT-B-32"}, "laion2b_s34b_b79k"),
        ({"data": "/nowhere/shards"}, "/nowhere/shards"),
        ({"tracking_uri": "http://127.0.0.1:9"}, "no tracking server at http://127.0.0.1:9"),
        ({"target_modules": "[nothing]"}, "nothing"),
        ({"storage_path": "/proc/nowhere"}, "storage_path"),
    ],
)
def test_mistakes_are_found_before_work_starts(servers, pairs, tiny_model_dir, changed, message):
    refused = servers.run("tat_train", *arguments(pairs, tiny_model_dir, "mistake", **changed))
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (servers.storage / "tat_train" / "mistake").exists()


def test_a_cluster_that_is_too_small_is_named(servers, pairs, tiny_model_dir):
    done = servers.run("tat_train", *arguments(pairs, tiny_model_dir, "mistake", num_workers=64))
    assert done.returncode == 2
    assert "cluster is too small" in done.stderr
    assert not (servers.storage / "tat_train" / "mistake").exists()
