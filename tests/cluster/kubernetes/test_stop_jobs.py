"""The head's preStop hook: jobs get SIGINT and their time, have then failed, and the hook says when one of them stays."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

HOOK = Path(__file__).resolve().parents[3] / "cluster" / "kubernetes" / "base" / "stop_jobs.py"
ROOT = HOOK.parents[3]
# Says that it is there, then what stopped it, after cleaning up for longer than the hook waits between two looks; ends as our jobs do.
JOB = """
import time
from jobs.session import run
def main():
    print("here", flush=True)
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(3)
        print("left in order", flush=True)
        raise
run(main)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("here", flush=True)
time.sleep(600)
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
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "10")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert home.command("up").returncode == 0
    address = home.state()["ray"]["url"]
    assert hook(address).stdout == ""  # nothing to stop
    client = JobSubmissionClient(address)
    names = {}
    for kind, text, end in (("ours", JOB, ""), ("shell", JOB, " || exit 1"), ("deaf", DEAF, "")):
        script = home.folder / f"{kind}.py"
        script.write_text(text)
        names[kind] = client.submit_job(entrypoint=f"PYTHONPATH={ROOT} {sys.executable} {script}{end}")
    deadline = time.monotonic() + 120
    while not all("here" in client.get_job_logs(name) for name in names.values()):
        assert time.monotonic() < deadline
        time.sleep(0.5)

    done = hook(address)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"stopping", *names.values()}
    for kind, name in names.items():
        info = client.get_job_info(name)
        assert info.status == "FAILED"  # what a RayJob tries again
        assert info.driver_exit_code in ((-9, 137) if kind == "deaf" else (1,))
        assert ("left in order" in client.get_job_logs(name)) == (kind != "deaf")
