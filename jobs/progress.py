"""How far a long job is, and what holds it up: for people (a line every few seconds), MLflow and Prometheus.

Workers measure with a `Meter` what each unit of work has done so far and how long its stages took, and tell a `Board`
now and then; the driver's `Reporter` adds up and shows. All of it may be lost at any moment without harm: what counts is
on storage.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import ray
from ray.util import metrics

from cir_core import files
from cir_core.schema import CirError

_TELL_EVERY_S = 2.0  # a worker tells the board
_SHOW_EVERY_S = 10.0  # the driver shows
_GAUGE_EVERY_S = 5.0
STAGES = ("read", "decode", "encode", "write")


_COUNTERS = {
    "rows": "Rows that were finished.",
    "rejects": "Rows that could not be used.",
    "megabytes": "Megabytes of encoded images.",
    "tiles": "Tiles of queries that a share of the gallery was searched for.",
}


class StageMetrics:
    """Ray metrics of a job in this process; Ray's agents serve them to Prometheus as ray_cir_<job>_<name>_total.

    counters: which of rows, rejects, megabytes and tiles the job counts.
    """

    def __init__(self, job: str, *counters: str) -> None:
        self._counters = {name: metrics.Counter(f"cir_{job}_{name}", description=_COUNTERS[name]) for name in counters}
        self._stages = metrics.Counter(
            f"cir_{job}_stage_seconds", description="Seconds that stages took of a worker's time.", tag_keys=("stage",)
        )
        count_storage_retries()

    def count(self, name: str, amount: float) -> None:
        """Add to a counter."""
        if amount > 0:
            self._counters[name].inc(amount)

    def stage(self, stage: str, seconds: float) -> None:
        """Add to a stage's time."""
        if seconds > 0:
            self._stages.inc(seconds, tags={"stage": stage})

    @contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stage(stage, time.perf_counter() - started)


class UnitGauge:
    """How many units of a job are done and left, as ray_cir_<job>_<unit> by state, while its block runs.

    Ray drops a gauge that nobody sets for 20 s (twice its report interval), as a job that is stuck would not; so a thread
    sets it again and again. Nothing is told before the first `show`. ask: returns what is done, for who learns it no
    other way; the thread asks each time, and an answer that does not come changes nothing.
    """

    def __init__(self, job: str, unit: str, ask: Callable[[], int] | None = None) -> None:
        self._ask, self._done, self._total = ask, 0, 0
        self._gauge = metrics.Gauge(f"cir_{job}_{unit}", description=f"{unit.title()} of a job.", tag_keys=("state",))
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"gauge-{unit}", daemon=True)

    def show(self, done: int, total: int) -> None:
        """Take in the newest numbers."""
        self._done, self._total = done, total
        self._set()

    def __enter__(self) -> UnitGauge:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(_GAUGE_EVERY_S):
            if self._ask is not None:
                with suppress(OSError, CirError), files.patience(_GAUGE_EVERY_S):
                    self._done = self._ask()
            self._set()

    def _set(self) -> None:
        if self._total:
            self._gauge.set(self._done, tags={"state": "done"})
            self._gauge.set(self._total - self._done, tags={"state": "left"})


@cache
def count_storage_retries() -> None:
    """Count requests to object stores that failed and are made again, by this process, as ray_cir_storage_retries_total."""
    retries = metrics.Counter("cir_storage_retries", description="Requests to object stores that are made again.")
    files.on_retry(retries.inc)


class Meter:
    """Counts and stage times of one unit of work, told to the board under the unit's key: done twice, it counts once."""

    def __init__(self, board: ray.actor.ActorHandle | None, exported: StageMetrics, *, key: str) -> None:
        self._board, self._exported, self._key = board, exported, key
        self._found: defaultdict[str, float] = defaultdict(float)
        self._told = time.monotonic()

    def count(self, **amounts: float) -> None:
        """Add to rows, rejects or megabytes."""
        for name, amount in amounts.items():
            self._found[name] += amount
            self._exported.count(name, amount)
        if time.monotonic() - self._told > _TELL_EVERY_S:
            self.tell()

    def busy(self, stage: str, seconds: float) -> None:
        """Add the time that other processes worked at a stage for this unit."""
        self._found[f"busy_{stage}"] += seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block as time that this worker gave to a stage, or waited for it."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.took(name, time.perf_counter() - started)

    def took(self, stage: str, seconds: float) -> None:
        """Add to the time that this worker gave to a stage."""
        self._found[f"stage_{stage}"] += seconds
        self._exported.stage(stage, seconds)

    def tell(self) -> None:
        """Tell the board; nobody waits for it, and one that is gone is no matter."""
        self._told = time.monotonic()
        if self._board is not None:
            with suppress(ray.exceptions.RayError):
                self._board.tell.remote(self._key, dict(self._found))

    def totals(self, prefix: str) -> dict[str, float] | None:
        """Return the board's sums over the units whose keys begin so, this one's newest counts with them.

        None if there is no board, or it does not answer.
        """
        self.tell()
        with suppress(ray.exceptions.RayError):
            if self._board is not None:
                found: dict[str, float] = ray.get(self._board.totals.remote(prefix), timeout=5)
                return found
        return None


@ray.remote(num_cpus=0, max_restarts=-1)
class Board:
    """Holds what every unit under way has done so far."""

    def __init__(self) -> None:
        self._units: dict[str, dict[str, float]] = {}
        self._total: defaultdict[str, float] = defaultdict(float)

    def tell(self, key: str, found: dict[str, float]) -> None:
        """Take in a unit's counts; the newest replace the older ones."""
        before = self._units.get(key, {})
        for name in before.keys() | found.keys():
            self._total[name] += found.get(name, 0.0) - before.get(name, 0.0)
        self._units[key] = found

    def totals(self, prefix: str = "") -> dict[str, float]:
        """Return the sums over all units, or over those whose keys begin so."""
        if not prefix:
            return dict(self._total)
        found: defaultdict[str, float] = defaultdict(float)
        for key, counts in self._units.items():
            if key.startswith(prefix):
                for name, amount in counts.items():
                    found[name] += amount
        return dict(found)


class Reporter:
    """Shows progress from a thread of the driver while its block runs.

    show: takes (seconds since the start, totals of the board), every ten seconds and once at the end.
    """

    def __init__(self, show: Callable[[float, Mapping[str, float]], None]) -> None:
        self.board: Any = Board.remote()  # type: ignore[attr-defined]
        self._show, self._started = show, time.perf_counter()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(20)
        ray.kill(self.board)

    def _run(self) -> None:
        ending = False
        while not ending:
            ending = self._ending.wait(_SHOW_EVERY_S)
            try:
                totals = ray.get(self.board.totals.remote(), timeout=5)
            except ray.exceptions.RayError:  # the board moves to another node
                continue
            self._show(time.perf_counter() - self._started, totals)


def stage_shares(totals: Mapping[str, float]) -> dict[str, float]:
    """Return which part of the workers' time each stage took, waiting for its results included; sums to 1."""
    seconds = {stage: totals.get(f"stage_{stage}", 0.0) for stage in STAGES}
    whole = sum(seconds.values())
    return {stage: value / whole for stage, value in seconds.items()} if whole else {}


def describe_stages(shares: Mapping[str, float]) -> str:
    """Say what the workers' time went to, and which stage to give more: 'decode 71 %, ...: decode holds it up'."""
    if not shares:
        return ""
    listed = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in shares.items())
    return f"{listed}: {max(shares, key=lambda stage: shares[stage])} is the bottleneck"
