"""End the jobs of this Ray head and wait until they have ended: what a head's preStop hook runs.

A job's processes get SIGINT and RAY_JOB_STOP_WAIT_TIME_S to leave in order, then SIGKILL, so that the job is FAILED and
its RayJob makes another attempt. Stopped through the Jobs API it would be STOPPED, which KubeRay takes for complete.
RAY_JOB_STOP_SIGNAL must be SIGINT on the head: Ray blocks this signal in its jobs otherwise.
Exit code 0: all have ended; 1: some have not, or the head does not answer.

    python stop_jobs.py [http://127.0.0.1:8265]        # RAY_AUTH_MODE and RAY_AUTH_TOKEN as everywhere in the pod
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from ray.job_submission import JobSubmissionClient

_SPARE_S = 15.0  # for SIGKILL and the last status after the jobs' own time
_POLL_S = 1.0
_SHELLS = ("sh\n", "bash\n", "dash\n")


def stop_jobs(client: JobSubmissionClient, *, wait_s: float) -> list[str]:
    """End every job that runs: SIGINT, after `wait_s` SIGKILL; returns the ids of those that live on for 15 s more."""
    going = [job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]
    if going:
        print("stopping", *going, flush=True)
    asked: set[str] = set()
    start = time.monotonic()
    while going and (passed := time.monotonic() - start) < wait_s + _SPARE_S:
        for name in going:
            if passed >= wait_s or name not in asked:  # once: what a job starts to clean up with is left alone
                asked |= {name} if _signal(name, signal.SIGKILL if passed >= wait_s else signal.SIGINT) else set()
        time.sleep(_POLL_S)
        going = [name for name in going if not client.get_job_status(name).is_terminal()]
    return going


def _signal(job: str, number: signal.Signals) -> bool:
    """Signal the processes that a job's supervisor has started, and their children; returns whether there are any.

    SIGINT spares shells: one would leave at once, with the job's status, and Ray would kill what still cleans up.
    """
    mark = f'"job_submission_id": "{job}"'.encode()
    found = False
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            spared = number == signal.SIGINT and (folder / "comm").read_text() in _SHELLS
            if not spared and mark in (folder / "environ").read_bytes():
                os.kill(int(folder.name), number)
                found = True
    return found


def main() -> None:
    """End this head's jobs; the exit code says whether they have ended."""
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8265"
    wait_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3"))
    try:
        left = stop_jobs(JobSubmissionClient(address), wait_s=wait_s)
    except (ConnectionError, RuntimeError) as error:
        sys.exit(f"the head at {address} does not answer: {error}")
    if left:
        sys.exit(f"still running after {wait_s + _SPARE_S:.0f} s: {', '.join(left)}")


if __name__ == "__main__":
    main()
