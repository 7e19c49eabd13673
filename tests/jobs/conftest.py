"""One real Ray head and one real MLflow server for all slow tests of the jobs, started as `make up` starts them."""

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

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray takes 127.0.0.1 for what it says; read when ray is imported
os.environ[LOOPBACK] = "0"

import ray  # noqa: E402

from jobs import session  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster" / "local" / "cluster.py"


@dataclass(frozen=True)
class Servers:
    """Addresses of the two servers, and how to run a job against them."""

    ray_address: str
    dashboard: str
    tracking_uri: str
    storage: Path

    def environment(self) -> dict[str, str]:
        """Return the environment of a job's driver."""
        own = {
            "RAY_ADDRESS": self.ray_address,
            LOOPBACK: "0",
            "RAY_AUTH_MODE": "disabled",
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "PYTHONWARNINGS": "",
        }
        return {**os.environ, **own}

    def command(self, job: str, *arguments: str) -> list[str]:
        """Return the command line of a job with its outputs below `storage`."""
        return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--storage_path", str(self.storage), *arguments]

    def run_alone(self, job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a job as people do, in a process of its own, and return what it printed."""
        return subprocess.run(
            self.command(job, *arguments),
            env=self.environment(),
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


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """Start both servers once; stop them after the last test."""
    home = tmp_path_factory.mktemp("servers")
    # Workers that have imported torch are kept for the next test: a start costs 20 seconds of a core.
    env = {**os.environ, "CIR_RUN_DIR": str(home / "run"), "RAY_num_workers_soft_limit": "8"}
    subprocess.run([sys.executable, str(CLUSTER), "up"], env=env, check=True, timeout=600)
    state = json.loads((home / "run" / "cluster.json").read_text())
    storage = home / "storage"
    storage.mkdir()
    (temporary,) = [part for part in psutil.Process(state["ray"]["pid"]).cmdline() if part.startswith("--temp-dir=")]
    yield Servers(state["ray"]["address"], state["ray"]["url"], state["mlflow"]["url"], storage)
    ray.shutdown()
    subprocess.run([sys.executable, str(CLUSTER), "down"], env=env, check=True, timeout=120)
    shutil.rmtree(temporary.partition("=")[2], ignore_errors=True)
