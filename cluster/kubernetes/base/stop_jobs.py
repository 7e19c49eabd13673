"""Stop the jobs of this Ray head and wait until they have ended: what a head's preStop hook runs.

A job gets RAY_JOB_STOP_SIGNAL and RAY_JOB_STOP_WAIT_TIME_S to leave in order, then SIGKILL; its next attempt goes on
from what is on storage. Exit code 0: all have ended; 1: some have not, or the head does not answer.

    python stop_jobs.py [http://127.0.0.1:8265]        # RAY_AUTH_MODE and RAY_AUTH_TOKEN as everywhere in the pod
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from ray.job_submission import JobStatus, JobSubmissionClient

_SPARE_S = 15.0  # for SIGKILL and the last status after the jobs' own time
_POLL_S = 1.0


def stop_jobs(client: JobSubmissionClient, *, patience_s: float) -> list[str]:
    """Stop every job that has not ended; returns the ids of those that live on after `patience_s`."""
    going = [job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]
    if not going:
        return []
    print("stopping", *going, flush=True)
    with ThreadPoolExecutor(len(going)) as pool:
        list(pool.map(client.stop_job, going))
    deadline = time.monotonic() + patience_s
    while going and time.monotonic() < deadline:
        going = [name for name in going if not _ended(client.get_job_status(name))]
        time.sleep(_POLL_S if going else 0)
    return going


def _ended(status: JobStatus) -> bool:
    return bool(status.is_terminal())


def main() -> None:
    """Stop this head's jobs; the exit code says whether they have ended."""
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8265"
    patience_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")) + _SPARE_S
    try:
        left = stop_jobs(JobSubmissionClient(address), patience_s=patience_s)
    except (ConnectionError, RuntimeError) as error:
        sys.exit(f"the head at {address} does not answer: {error}")
    if left:
        sys.exit(f"still running after {patience_s:.0f} s: {', '.join(left)}")


if __name__ == "__main__":
    main()
