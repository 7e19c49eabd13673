"""One job under faults: started, hurt and started again with the same command until it ends well."""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import kills
from checks import Check
from lab import Lab

_MAX_ATTEMPTS = 12
_TIMEOUT_S = 1500.0  # a run takes 1 to 4 minutes on two idle cores
_RATE = 0.12  # share of the requests that get a fault while there are any left
_SHARE_AFTER_PROGRESS = 0.7  # of the kills wait until work is being done; the others also hit a job that starts
_QUICK = ("decode_worker", "s3_outage", "mlflow_outage")  # a job has not to start anything slow after these


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A job and what is to be done to it. kills: kinds of kills.KINDS in order; http: how many faults of each kind.

    settings: the job's command line. progress: what the paths of objects look like that are finished work.
    pace: bytes per second of each download while there are kills to come.
    """

    name: str
    job: str
    settings: Mapping[str, Any]
    progress: str
    kills: tuple[str, ...] = ()
    http: Mapping[str, int] = field(default_factory=dict)
    pace: float = 0.0
    seed: int = 0


@dataclass
class Outcome:
    """What happened in a run.

    missed: kills that were planned and hit nothing. http: every single fault of the proxy. downloaded: bytes by path.
    uploads: how often each object was written whole. seconds: from the first start to the last end.
    """

    name: str
    job: str
    exit_codes: list[int] = field(default_factory=list)
    kills: list[kills.Kill] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    http: list[dict[str, Any]] = field(default_factory=list)
    http_counts: dict[str, int] = field(default_factory=dict)
    downloaded: dict[str, int] = field(default_factory=dict)
    uploads: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    check: Check = field(default_factory=Check)

    @property
    def recovered(self) -> bool:
        """Whether the job ended well and its result is that of the fault-free run."""
        return bool(self.exit_codes) and self.exit_codes[-1] == 0 and self.check.ok

    def to_json(self) -> dict[str, Any]:
        """Return all of it but the traffic by object."""
        value = asdict(self)
        del value["downloaded"], value["uploads"]
        return {**value, "recovered": self.recovered}


class Run:
    """Carries one PlannedRun out."""

    def __init__(self, lab: Lab, planned: PlannedRun, log: Path) -> None:
        self.lab, self.planned, self.log = lab, planned, log
        self.outcome = Outcome(planned.name, planned.job)
        self.rng = random.Random(f"{planned.seed}:{planned.name}")
        self.left = list(planned.kills)
        self.progress_at_kill = 0
        self.next_at: float | None = None
        self.drawn: tuple[float, bool] | None = None  # delay of the next kill, and whether it waits for finished work

    def carry_out(self) -> Outcome:
        """Run the job to its end; the outcome is still to be checked."""
        planned, started = self.planned, time.monotonic()
        self.lab.proxy.plan(planned.http, rate=_RATE, seed=planned.seed, pace=planned.pace)
        driver = self._launch()
        try:
            while time.monotonic() - started < _TIMEOUT_S:
                code = driver.poll()
                if code is None:
                    self._kill_if_it_is_time(driver)
                    time.sleep(0.2)
                    continue
                self.outcome.exit_codes.append(code)
                if code == 0 or len(self.outcome.exit_codes) == _MAX_ATTEMPTS:
                    break
                driver = self._launch()
        finally:
            if driver.poll() is None:
                driver.kill()
                self.outcome.exit_codes.append(driver.wait())
                self.outcome.check.problems.append(f"had not ended after {_TIMEOUT_S:g} s")
            self._collect(time.monotonic() - started)
        return self.outcome

    def _launch(self) -> subprocess.Popen[bytes]:
        self.next_at = None
        return self.lab.launch(self.planned.job, self.planned.settings, self.log)

    def _kill_if_it_is_time(self, driver: subprocess.Popen[bytes]) -> None:
        if not self.left:
            return
        if self.next_at is None:
            self.next_at = self._moment(self.left[0])
        if self.next_at is None or time.monotonic() < self.next_at:
            return
        kind = self.left.pop(0)
        done = kills.do(kind, self.lab, driver, self.rng.randrange)
        if done is None:
            self.outcome.missed.append(kind)
        else:
            self.outcome.kills.append(done)
            print(f"  {time.strftime('%H:%M:%S')}  {done.kind}: {done.target}", flush=True)
        self.progress_at_kill, self.next_at, self.drawn = self._progress(), None, None
        if not self.left:
            self.lab.proxy.set_pace(0)  # nothing more to come: to the end as quickly as it goes

    def _moment(self, kind: str) -> float | None:
        """Return when the next kill is due, None while it waits for work to be done."""
        if self.drawn is None:
            first = not self.outcome.kills and kind != "driver"
            waits = first or (kind not in _QUICK and self.rng.random() < _SHARE_AFTER_PROGRESS)
            self.drawn = (self.rng.uniform(1, 5) if waits else self.rng.uniform(2, 20), waits)
        delay, waits = self.drawn
        if waits and self._progress() <= self.progress_at_kill:
            return None
        return time.monotonic() + delay

    def _progress(self) -> int:
        """Return how many objects were written that are finished work."""
        uploads: dict[str, int] = self.lab.proxy.report()["uploads"]
        return sum(number for path, number in uploads.items() if re.search(self.planned.progress, path))

    def _collect(self, seconds: float) -> None:
        report = self.lab.proxy.report()
        self.lab.proxy.plan({}, rate=0, seed=0)
        outcome = self.outcome
        outcome.missed += self.left
        outcome.http, outcome.http_counts = report["done"], report["counts"]
        outcome.downloaded, outcome.uploads = report["downloaded"], report["uploads"]
        outcome.seconds = round(seconds, 1)
