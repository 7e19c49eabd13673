"""A run folder of a test's own, and the commands of cluster/local run in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import psutil
import pytest

SCRIPT = Path(processes.__file__).with_name("cluster.py")


@dataclass(frozen=True)
class Home:
    """A run folder (CIR_RUN_DIR of this process) and what runs there."""

    folder: Path

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of cluster.py to its end."""
        return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=500)

    def state(self) -> dict[str, dict[str, Any]]:
        """Return what is recorded."""
        return json.loads((self.folder / "cluster.json").read_text())

    def processes(self) -> list[psutil.Process]:
        """Return every living process that has this run folder in its environment or its command line."""
        found, name = [], str(self.folder)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    own = process.environ().get("CIR_RUN_DIR") == name or name in " ".join(process.cmdline())
                    found += [process] if own else []
        return found

    def listening(self) -> set[str]:
        """Return every address that one of the recorded servers listens on."""
        return {
            connection.laddr.ip.removeprefix("::ffff:")
            for record in self.state().values()
            for process in processes.family(record)
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }


@pytest.fixture
def home(tmp_path, monkeypatch) -> Iterator[Home]:
    """A run folder of the test's own; whatever was started there is stopped at the end."""
    short = tempfile.mkdtemp(prefix="cir", dir="/tmp")  # the path of a Unix socket has 107 bytes
    monkeypatch.setenv("CIR_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("RAY_TMPDIR", short)
    for name in processes.PORTS:
        monkeypatch.delenv(f"CIR_{name.upper()}_PORT", raising=False)
    found = Home(tmp_path / "run")
    yield found
    monkeypatch.setenv("CIR_RUN_DIR", str(found.folder))
    found.command("down")
    processes.reap()
    shutil.rmtree(short, ignore_errors=True)
