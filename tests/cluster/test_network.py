"""A cluster of four machines in namespaces, with what the manifests give a pod: jobs from outside, machines that go away.

Shards, stores and checkpoints are in an S3 server, as in the overlay dev.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import network
import processes
import psutil
import pyarrow.parquet as pq
import pytest
import ray_nodes
import requests
import s3_server
from ray.job_submission import JobSubmissionClient

from cir_core import files
from cir_core.embedding_store import EmbeddingStore
from cir_core.scenes import write_pairs

SCRIPT = Path(network.__file__)
NUM_PAIRS, BATCH, EPOCHS = 4800, 100, 4
STEPS = EPOCHS * NUM_PAIRS // BATCH
DATA, RUNS = "s3://cir/shards", "s3://cir/runs/tat_train"
TRAIN = ["jobs/tat_train.py", "--data", DATA, "--global_batch_size", str(BATCH), "--log_every_steps", "5",
         "--record_samples", "true", "--epochs"]  # fmt: skip
WHOLE = [*TRAIN, str(EPOCHS)]
NEVER = ["--checkpoint_every_steps", "100000"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("iptables") is None, reason="needs root and iptables"),
]


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of network.py, whose run folder is in `folder`."""
    own = {**os.environ, "CIR_RUN_DIR": str(folder)}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=own, capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Three workers are up; the run folder. All that was made is gone afterwards."""
    run_dir = tmp_path_factory.mktemp("network")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIR_RUN_DIR", str(run_dir / "network"))  # as the command sets it for itself
        try:
            done = command(run_dir, "up", "--workers", "3", "--num-cpus", "3")
            assert done.returncode == 0, done.stderr
            for name, value in s3_server.load_server(network.HERE).environment().items():
                patch.setenv(name, value)
            write_pairs(DATA, NUM_PAIRS, shard_rows=100)
            yield run_dir
        finally:
            print(command(run_dir, "down").stdout)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert "cir-" not in left.stdout
    running = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
    assert [process for process in running if "cir-worker" in " ".join(process.info["cmdline"])] == []


def submitted(folder: Path, *entrypoint: str, meanwhile: Callable[[Path], None]) -> tuple[int, str]:
    """Submit a job as a person outside the cluster does; return its end and what it printed, a file in the meantime."""
    line = [str(processes.BIN / "ray"), "job", "submit", "--address", network.URL, "--", "python", *entrypoint]
    path = folder / f"{time.monotonic_ns()}.log"
    with path.open("w") as log:
        job = subprocess.Popen(line, env={**os.environ, **token()}, stdout=log, stderr=log)
        try:
            meanwhile(path)
            code = job.wait(timeout=1500)
        finally:
            job.kill()
    return code, path.read_text()


def token() -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": network.token_file().read_text()}


def finished(folder: Path, *entrypoint: str, meanwhile: Callable[[Path], None] = lambda _: None) -> str:
    """As `submitted`, for a job that must succeed; return what it printed."""
    code, said = submitted(folder, *entrypoint, meanwhile=meanwhile)
    assert code == 0, said[-4000:]
    return said


def busy(title: str) -> str:
    """Return the node that has a process of this title, once there is one."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for name in ("worker-1", "worker-2", "worker-3"):
            record = processes.load_state()[name]
            for process in processes.family(record) if processes.alive(record) else []:
                try:
                    if title in " ".join(process.cmdline()):
                        return name
                except psutil.Error:
                    continue
        time.sleep(0.2)
    raise AssertionError(f"no node has {title}")


def alive() -> set[str]:
    found = network.alive_addresses()
    return {f"worker-{int(address.rpartition('.')[2]) - 10}" for address in found} - {"worker-0"}


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_only_the_jobs_api_can_be_reached_and_only_with_the_token(folder):
    assert requests.get(f"{network.URL}/api/jobs/", timeout=10).status_code == 401
    wrong = {"Authorization": "Bearer " + "0" * 64}
    assert requests.get(f"{network.URL}/api/jobs/", headers=wrong, timeout=10).status_code in (401, 403)
    right = {"Authorization": f"Bearer {network.token_file().read_text()}"}
    assert requests.get(f"{network.URL}/api/jobs/", headers=right, timeout=10).status_code == 200
    assert network.token_file().stat().st_mode & 0o777 == 0o600
    for host, port in [("10.231.7.10", 6379), ("10.231.7.10", 8080), ("10.231.7.11", 8080), ("10.231.7.11", 52365)]:
        with pytest.raises(OSError, match="timed out"):
            socket.create_connection((host, port), timeout=2)
    head = processes.family(processes.load_state()["head"])
    token = network.token_file().read_text()
    assert all(token not in " ".join(process.cmdline()) for process in head)


def test_a_partition_is_one_however_often_it_is_cut_and_ends_with_one_heal(folder):
    knock = "import socket; socket.create_connection(('10.231.7.10', 6379), timeout=2)"
    for change in ("cut", "cut", "heal", "heal"):
        assert command(folder, change, "worker-3").returncode == 0
        line = ["ip", "netns", "exec", "cir-worker-3", sys.executable, "-c", knock]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert (done.returncode == 0) == (change == "heal"), done.stderr


def have_three_workers(folder: Path) -> None:
    """Replace nodes that were lost, cut off or evicted."""
    assert command(folder, "up", "--workers", "3", "--num-cpus", "3").returncode == 0
    wait_until(lambda: len(alive()) == 3, 200)


def trainers() -> int:
    found = ray_nodes.listed(network.URL, "actors", token=network.token_file().read_text())
    return sum("RayTrainWorker" in actor["class_name"] for actor in found)


def listed(uri: str, pattern: str) -> list[str]:
    """Return what a pattern finds in the URIs below `uri`, in order."""
    found = (re.search(pattern, item.uri) for item in (files.list_files(uri) if files.exists(uri) else ()))
    return sorted(match[0] for match in found if match)


def checkpoints(run: str) -> list[int]:
    """Return the steps of a run's checkpoints."""
    return [int(name[5:13]) for name in listed(f"{RUNS}/{run}/state", r"step-\d{8}/state\.safetensors")]


def adapter(run: str) -> str:
    """Return the digest of the weights that a run ended in."""
    return hashlib.sha256(files.read_bytes(f"{RUNS}/{run}/adapter/adapter_model.safetensors")).hexdigest()


def check_every_sample_once(run: str, epochs: int, epoch_steps: int) -> None:
    """Check that each sample of each epoch went through one step that was kept."""
    tables = [files.read_bytes(item.uri) for item in files.list_files(f"{RUNS}/{run}/samples")]
    seen = [row for table in tables for row in pq.read_table(io.BytesIO(table)).to_pylist()]
    assert {row["step"] for row in seen} == set(range(epochs * epoch_steps))
    once = {(row["step"] // epoch_steps, row["shard"], row["key"]) for row in seen}
    assert len(seen) == len(once) == epochs * NUM_PAIRS


@pytest.fixture(scope="module")
def whole(folder: Path) -> str:
    """The digest of the weights of an undisturbed run."""
    finished(folder, *WHOLE, "--name", "whole")
    return adapter("whole")


def test_embedding_survives_a_lost_machine_and_one_that_is_cut_off(folder):
    embed = ["jobs/embed.py", "--data", DATA, "--batch_size", "50", "--num_encoders", "2"]
    stores = [f"s3://cir/stores/{name}" for name in ("whole", "faults")]
    finished(folder, *embed, "--output", stores[0])

    def break_things(_: Path) -> None:
        wait_until(lambda: bool(listed(f"{stores[1]}/_progress", ".+")), 300)
        lost = busy("ray::MapWorker(MapBatches(ShardEmbedder))")
        assert command(folder, "kill", lost).returncode == 0
        gone = busy("ray::MapWorker(MapBatches(ShardEmbedder))")
        assert command(folder, "cut", gone).returncode == 0
        assert not files.exists(f"{stores[1]}/manifest.json")
        wait_until(lambda: alive() == {"worker-1", "worker-2", "worker-3"} - {lost, gone}, 200)

    finished(folder, *embed, "--output", stores[1], meanwhile=break_things)
    undisturbed, disturbed = map(EmbeddingStore.open, stores)
    assert disturbed.num_rows == NUM_PAIRS
    assert [part.sha256 for part in disturbed.parts] == [part.sha256 for part in undisturbed.parts]


def test_training_survives_a_machine_that_is_cut_off(folder, whole):
    have_three_workers(folder)

    def cut_off(_: Path) -> None:
        wait_until(lambda: bool(checkpoints("faults")), 400)
        assert command(folder, "cut", busy("ray::RayTrainWorker")).returncode == 0

    finished(folder, *WHOLE, "--checkpoint_every_steps", "20", "--name", "faults", meanwhile=cut_off)
    assert adapter("faults") == whole


def test_a_machine_that_is_to_go_leaves_a_checkpoint(folder, whole):
    """SIGTERM, as Kubernetes ends a pod, where no checkpoint is due before the run's end."""
    have_three_workers(folder)

    def evict(log: Path) -> None:
        wait_until(lambda: "step 5/" in log.read_text(), 400)
        assert command(folder, "evict", busy("ray::RayTrainWorker")).returncode == 0
        wait_until(lambda: bool(checkpoints("evicted")), 30)

    said = finished(folder, *WHOLE, *NEVER, "--name", "evicted", meanwhile=evict)
    assert "a machine is about to go, checkpoint" in said
    first, last = checkpoints("evicted")
    assert 5 <= first < last == STEPS
    check_every_sample_once("evicted", EPOCHS, STEPS // EPOCHS)
    assert adapter("evicted") == whole


def test_a_job_that_is_stopped_leaves_a_checkpoint(folder, whole):
    """`ray job stop`, with the signal and the time that the manifests give."""
    have_three_workers(folder)
    job = [*WHOLE, *NEVER, "--name", "stopped"]

    def stop(log: Path) -> None:
        wait_until(lambda: "step 5/" in log.read_text(), 400)
        headers = {"Authorization": f"Bearer {network.token_file().read_text()}"}
        client = JobSubmissionClient(network.URL, headers=headers)
        (running,) = (job.submission_id for job in client.list_jobs() if not job.status.is_terminal())
        assert client.stop_job(running)

    _, said = submitted(folder, *job, meanwhile=stop)  # ends with 0: a job that is stopped has not failed
    (step,) = checkpoints("stopped")
    assert f"the checkpoint of step {step} is written" in said
    assert f"going on after step {step}" in finished(folder, *job)
    check_every_sample_once("stopped", EPOCHS, STEPS // EPOCHS)
    assert adapter("stopped") == whole


def test_training_shrinks_with_a_lost_machine_and_grows_with_a_new_one(folder):
    """Every sample of every epoch goes through one step, whatever the number of workers was at the time."""
    have_three_workers(folder)
    epochs, epoch_steps = 8, NUM_PAIRS // BATCH
    train = [*TRAIN, str(epochs), "--name", "elastic", "--num_workers", "[1,3]", "--cpus_per_worker", "2",
             "--checkpoint_every_steps", "25", "--max_failures", "-1"]  # fmt: skip

    def lose_one_and_bring_one(_: Path) -> None:
        wait_until(lambda: trainers() == 3 and bool(checkpoints("elastic")), 300)
        assert command(folder, "kill", busy("ray::RayTrainWorker")).returncode == 0
        wait_until(lambda: trainers() == 2, 200)
        known = max(checkpoints("elastic"))
        wait_until(lambda: max(checkpoints("elastic")) > known, 200)
        have_three_workers(folder)
        wait_until(lambda: trainers() == 3, 300)

    finished(folder, *train, meanwhile=lose_one_and_bring_one)
    result = files.read_json(f"{RUNS}/elastic/result.json")
    assert result["steps"] == epochs * epoch_steps
    assert [count for count, _ in itertools.groupby(row["num_workers"] for row in result["history"])] == [3, 2, 3]
    check_every_sample_once("elastic", epochs, epoch_steps)
