"""From `ray job submit` to the first training step and to the first search result, stage by stage.

Called by jobs/benchmark.py; needs the cluster and the tracking server that `make up` starts.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cir_core import files
from cir_core.schema import CirError
from jobs.config import repository_root
from jobs.storage import RunFolder

if TYPE_CHECKING:
    from jobs.benchmark import BenchmarkConfig
    from jobs.benchmark_training import Measured

_SUBMISSION = "submission"  # until the job's process starts
# What comes first is not counted: it generates the data and embeds the gallery, which the others find.
_JOBS = {
    "tat_train": ("--num_pairs", "1000", "--gap_samples", "64"),
    "batch_retrieve": ("--adapter", "none", "--num_queries", "30", "--contact_sheet_rows", "1"),
}


def measure_start_up(config: BenchmarkConfig) -> Measured:
    """Submit both jobs in turns, one after the other; medians of what their stages take."""
    from jobs.benchmark_training import Measured

    found: dict[str, list[dict[str, float]]] = {job: [] for job in _JOBS}
    with tempfile.TemporaryDirectory() as home:
        for number in range(config.rounds + 1):
            for job, settings in _JOBS.items():
                stages = submitted(job, f"start-{number}", home, settings)
                found[job] += [stages] if number else []
    medians = {
        job: {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]} for job, runs in found.items()
    }
    tables = [_table(job, medians[job], [run["total"] for run in found[job]]) for job in _JOBS]
    metrics = {f"start_up/{job}/{stage}": spent for job, stages in medians.items() for stage, spent in stages.items()}
    return Measured("\n".join(["### Start-up", "", *tables]), metrics)


def submitted(job: str, name: str, home: str, settings: Sequence[str]) -> dict[str, float]:
    """Submit a job, wait for its end, and return the seconds of its stages from the submission on, and "total".

    Raises:
        CirError: the job failed; the message ends with its last lines.
    """
    ray = str(Path(sys.executable).with_name("ray"))
    arguments = ["--name", name, "--storage_path", home, *settings]
    started = time.time()
    done = subprocess.run(
        [ray, "job", "submit", "--", sys.executable, f"jobs/{job}.py", *arguments],
        cwd=repository_root(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CirError(
            f"start_up: {job} failed; it needs the servers of `make up`. {(done.stdout + done.stderr)[-1000:]}"
        )
    result: dict[str, Any] = files.read_json(RunFolder(home, job, name).path("result.json"))
    stages: dict[str, float] = dict(result["start_up"])
    waited = result["process_began"] - started
    return {_SUBMISSION: waited, **stages, "total": stages["total"] + waited}


def _table(job: str, medians: dict[str, float], totals: Sequence[float]) -> str:
    end = "first step" if job == "tat_train" else "first search result"
    head = f"| {job}, median of {len(totals)} | seconds |"
    rows = [f"| {stage} | {spent:.1f} |" for stage, spent in medians.items() if stage != "total"]
    last = f"| submission to {end} | {medians['total']:.1f} [{min(totals):.1f}, {max(totals):.1f}] |"
    return "\n".join([head, "|---|---|", *rows, last, ""])
