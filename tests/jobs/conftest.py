"""One real Ray head and one real MLflow server for all slow tests of the jobs, started as `make up` starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

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
