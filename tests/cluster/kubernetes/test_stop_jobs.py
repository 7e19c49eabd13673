"""The head's preStop hook: jobs get SIGINT and their time, and the hook says when one of them stays."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

HOOK = Path(__file__).resolve().parents[3] / "cluster" / "kubernetes" / "base" / "stop_jobs.py"
# Says that it is there, then what stopped it, after a second of cleaning up.
JOB = """
import time
print("here", flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(1)
    print("left in order", flush=True)
"""


def hook(address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(HOOK), address], capture_output=True, text=True, timeout=120)


def test_a_head_that_does_not_answer_is_said():
    done = hook("http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("the head at http://127.0.0.1:9 does not answer")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_jobs_leave_in_order(home, monkeypatch):
    monkeypatch.setenv("RAY_JOB_STOP_SIGNAL", "SIGINT")
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "30")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert home.command("up").returncode == 0
    address = home.state()["ray"]["url"]
    assert hook(address).stdout == ""  # nothing to stop
    client = JobSubmissionClient(address)
    script = home.folder / "job.py"
    script.write_text(JOB)
    names = [client.submit_job(entrypoint=f"python {script}") for _ in range(2)]
    deadline = time.monotonic() + 120
    while not all("here" in client.get_job_logs(name) for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.5)

    done = hook(address)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"stopping", *names}
    for name in names:
        assert client.get_job_status(name) == "STOPPED"
        assert "left in order" in client.get_job_logs(name)
