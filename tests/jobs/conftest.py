"""One real Ray head, MLflow server and S3 server for all slow tests of the jobs, started as `make up` and `make s3` do."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil
import pytest
import s3_server

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray takes 127.0.0.1 for what it says; read when ray is imported
os.environ[LOOPBACK] = "0"

import ray  # noqa: E402

from jobs import session  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster" / "local" / "cluster.py"


@dataclass(frozen=True)
class Servers:
    """Addresses of the servers, and how to run a job against them. home: their logs and data; ray_folder: Ray's."""

    ray_address: str
    dashboard: str
    tracking_uri: str
    storage: Path
    home: Path
    ray_folder: Path
    variables: dict[str, str]

    def environment(self) -> dict[str, str]:
        """Return the environment of a job's driver; s3:// is the S3 server, as it is for every worker."""
        own = {
            "RAY_ADDRESS": self.ray_address,
            LOOPBACK: "0",
            "RAY_AUTH_MODE": "disabled",
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "PYTHONWARNINGS": "",
            **self.variables,
        }
        return {**os.environ, **own}

    def command(self, job: str, *arguments: str) -> list[str]:
        """Return the command line of a job with its outputs below `storage`."""
        return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--storage_path", str(self.storage), *arguments]

    def run_alone(self, job: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a job as people do, in a process of its own with these variables too, and return what it printed."""
        return subprocess.run(
            self.command(job, *arguments),
            env={**self.environment(), **variables},
            cwd=self.storage,
            capture_output=True,
            text=True,
            timeout=400,
        )

    def run(self, job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a job's main in this process: the same cluster and the same code, without half a minute of imports."""
        main = importlib.import_module(f"jobs.{job}").main
        command = self.command(job, *arguments)
        own = {name: value for name, value in self.environment().items() if os.environ.get(name) != value}
        code = 0
        with (
            mock.patch.dict(os.environ, own),
            mock.patch.object(sys, "argv", command[1:]),
            contextlib.chdir(self.storage),
            contextlib.redirect_stdout(io.StringIO()) as printed,
            contextlib.redirect_stderr(io.StringIO()) as complaints,
        ):
            try:
                session.run(main)
            except SystemExit as stop:
                code = int(stop.code or 0)
        return subprocess.CompletedProcess(command, code, printed.getvalue(), complaints.getvalue())


@dataclass(frozen=True)
class S3:
    """The S3 server, which every worker of `servers` reaches too. environment: what its clients need."""

    endpoint: str
    bucket_uri: str
    environment: dict[str, str]
    run_dir: Path


def cluster_command(run_dir: Path, command: str, **variables: str) -> None:
    env = {**os.environ, "CIR_RUN_DIR": str(run_dir), **variables}
    subprocess.run([sys.executable, str(CLUSTER), command], env=env, check=True, timeout=600)


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """Start the S3 server once; stop it, and what else was started in its run folder, after the last test."""
    run_dir = tmp_path_factory.mktemp("servers") / "run"
    cluster_command(run_dir, "s3")
    with mock.patch.dict(os.environ, {"CIR_RUN_DIR": str(run_dir)}):
        server = s3_server.load_server()
    yield S3(server.endpoint, server.bucket_uri, server.environment(), run_dir)
    cluster_command(run_dir, "down")


@pytest.fixture(scope="session")
def servers(s3):
    """Start Ray and MLflow once, with the S3 server's variables; stop them after the last test."""
    # Workers that have imported torch are kept for the next test: a start costs 20 seconds of a core.
    cluster_command(s3.run_dir, "up", RAY_num_workers_soft_limit="8", **s3.environment)
    state = json.loads((s3.run_dir / "cluster.json").read_text())
    storage = s3.run_dir.parent / "storage"
    storage.mkdir()
    (temporary,) = [part for part in psutil.Process(state["ray"]["pid"]).cmdline() if part.startswith("--temp-dir=")]
    ray_folder = Path(temporary.partition("=")[2])
    addresses = (state["ray"]["address"], state["ray"]["url"], state["mlflow"]["url"])
    yield Servers(*addresses, storage, home=s3.run_dir, ray_folder=ray_folder, variables=s3.environment)
    ray.shutdown()
    cluster_command(s3.run_dir, "down")
    shutil.rmtree(ray_folder, ignore_errors=True)
