"""A cluster of four machines in namespaces, with what the manifests give a pod: jobs from outside, a node lost, one cut off."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
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

from cir_core.embedding_store import EmbeddingStore
from cir_core.scenes import write_pairs

SCRIPT = Path(network.__file__)
NUM_PAIRS = 4800

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
            yield run_dir
        finally:
            print(command(run_dir, "down").stdout)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert "cir-" not in left.stdout
    running = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
    assert [process for process in running if "cir-worker" in " ".join(process.info["cmdline"])] == []


def finished(folder: Path, *entrypoint: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Submit a job as a person outside the cluster does, and wait for its end."""
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": network.token_file().read_text()}
    line = [str(processes.BIN / "ray"), "job", "submit", "--address", network.URL, "--", "python", *entrypoint]
    path = folder / f"{time.monotonic_ns()}.log"
    with path.open("w") as log:
        job = subprocess.Popen(line, env={**os.environ, **own}, stdout=log, stderr=log)
        try:
            meanwhile()
            code = job.wait(timeout=1500)
        finally:
            job.kill()
    assert code == 0, path.read_text()[-4000:]


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


def test_a_job_survives_a_lost_node_and_one_that_is_cut_off(folder, tmp_path_factory):
    data = str(tmp_path_factory.mktemp("shards"))
    write_pairs(data, NUM_PAIRS, shard_rows=100)
    embed = ["jobs/embed.py", "--data", data, "--batch_size", "50", "--num_encoders", "2"]
    train = ["jobs/tat_train.py", "--data", data, "--global_batch_size", "100", "--checkpoint_every_steps", "10"]
    finished(folder, *embed, "--output", str(folder / "whole"))
    finished(folder, *train, "--name", "whole")
    parts = folder / "faults" / "_progress"

    def break_things() -> None:
        wait_until(lambda: parts.exists() and any(parts.iterdir()), 300)
        lost = busy("ray::MapWorker(MapBatches(ShardEmbedder))")
        assert command(folder, "kill", lost).returncode == 0
        gone = busy("ray::MapWorker(MapBatches(ShardEmbedder))")
        assert command(folder, "cut", gone).returncode == 0
        assert not (folder / "faults" / "manifest.json").exists()
        wait_until(lambda: alive() == {"worker-1", "worker-2", "worker-3"} - {lost, gone}, 200)

    finished(folder, *embed, "--output", str(folder / "faults"), meanwhile=break_things)
    whole, faults = (EmbeddingStore.open(str(folder / name)) for name in ("whole", "faults"))
    assert faults.num_rows == NUM_PAIRS
    assert [part.sha256 for part in faults.parts] == [part.sha256 for part in whole.parts]

    assert command(folder, "up", "--workers", "3", "--num-cpus", "3").returncode == 0  # a new machine for each
    wait_until(lambda: len(alive()) == 3, 200)

    def cut_off_training() -> None:
        checkpoints = folder / "network" / "storage" / "tat_train" / "faults"
        wait_until(lambda: any(checkpoints.glob("**/checkpoint_*")), 400)
        command(folder, "cut", busy("ray::RayTrainWorker"))

    finished(folder, *train, "--name", "faults", meanwhile=cut_off_training)
    runs = folder / "network" / "storage" / "tat_train"
    first, second = (runs / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "faults"))
    assert hashlib.sha256(second.read_bytes()).digest() == hashlib.sha256(first.read_bytes()).digest()


def trainers() -> int:
    found = ray_nodes.listed(network.URL, "actors", token=network.token_file().read_text())
    return sum("RayTrainWorker" in actor["class_name"] for actor in found)


def test_training_shrinks_with_a_lost_node_and_grows_with_a_new_one(folder, tmp_path):
    """Every sample of every epoch goes through one step, whatever the number of workers was at the time."""
    epochs, batch = 8, 100
    write_pairs(str(tmp_path), NUM_PAIRS, shard_rows=100)
    assert command(folder, "up", "--workers", "3", "--num-cpus", "3").returncode == 0
    wait_until(lambda: len(alive()) == 3, 200)
    train = ["jobs/tat_train.py", "--data", str(tmp_path), "--name", "elastic", "--epochs", str(epochs), "--num_workers", "[1,3]",
             "--cpus_per_worker", "2", "--global_batch_size", str(batch), "--checkpoint_every_steps", "25",
             "--log_every_steps", "10", "--record_samples", "true", "--max_failures", "-1"]  # fmt: skip
    run = folder / "network" / "storage" / "tat_train" / "elastic"

    def checkpoints() -> set[str]:
        return {path.parent.name for path in run.glob("state/step-*/state.safetensors")}

    def lose_one_and_bring_one() -> None:
        wait_until(lambda: trainers() == 3 and bool(checkpoints()), 300)
        command(folder, "kill", busy("ray::RayTrainWorker"))
        wait_until(lambda: trainers() == 2, 200)
        known = checkpoints()
        wait_until(lambda: bool(checkpoints() - known), 200)
        assert command(folder, "up", "--workers", "3", "--num-cpus", "3").returncode == 0
        wait_until(lambda: trainers() == 3, 300)

    finished(folder, *train, meanwhile=lose_one_and_bring_one)
    result = json.loads((run / "result.json").read_text())
    steps = epochs * NUM_PAIRS // batch
    assert result["steps"] == steps
    assert [count for count, _ in itertools.groupby(row["num_workers"] for row in result["history"])] == [3, 2, 3]
    seen = [row for path in sorted(run.glob("samples/*.parquet")) for row in pq.read_table(path).to_pylist()]
    epoch_steps = steps // epochs
    assert (
        len(seen) == len({(row["step"] // epoch_steps, row["shard"], row["key"]) for row in seen}) == epochs * NUM_PAIRS
    )
