"""One real Ray head and one real MLflow server for all slow tests of the jobs, started as `make up` starts them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray takes 127.0.0.1 for what it says; read when ray is imported
os.environ[LOOPBACK] = "0"

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

    def run(self, job: str, *arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """Run a job to its end and return what it printed."""
        return subprocess.run(
            self.command(job, *arguments),
            env=self.environment(),
            cwd=self.storage,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


@pytest.fixture
def run_here(servers, monkeypatch, capsys):
    """Return a function that runs a job in this process: no seconds of imports for a mistake found in milliseconds."""

    def run_job(job: str, *arguments: str) -> tuple[int, str]:
        module = importlib.import_module(f"jobs.{job}")
        monkeypatch.setattr(sys, "argv", servers.command(job, *arguments)[1:])
        monkeypatch.setenv("MLFLOW_TRACKING_URI", servers.tracking_uri)
        monkeypatch.setenv("RAY_ADDRESS", servers.ray_address)
        monkeypatch.chdir(servers.storage)
        with pytest.raises(SystemExit) as exit_info:
            session.run(module.main)
        return int(exit_info.value.code or 0), capsys.readouterr().err

    return run_job


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """Start both servers once; stop them after the last test."""
    home = tmp_path_factory.mktemp("servers")
    env = {**os.environ, "CIR_RUN_DIR": str(home / "run")}
    subprocess.run([sys.executable, str(CLUSTER), "up"], env=env, check=True, timeout=600)
    state = json.loads((home / "run" / "cluster.json").read_text())
    storage = home / "storage"
    storage.mkdir()
    yield Servers(state["ray"]["address"], state["ray"]["url"], state["mlflow"]["url"], storage)
    subprocess.run([sys.executable, str(CLUSTER), "down"], env=env, check=True, timeout=120)
