"""The campaign's data, jobs and runs: which faults each run gets."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from faults import ALL_KINDS
from lab import Lab
from runs import PlannedRun

from cir_core.scenes import write_pairs
from cir_core.shards import write_tar_shard
from cir_core.shards.write import RawSample

_SHARD_ROWS, _SHARD_BYTES = 100, 400_000
# Seconds that a kill of a kind keeps a job busy on two cores, the pause before it included.
_SECONDS = {"decode_worker": 8, "encode_actor": 25, "train_worker": 30, "raylet": 25, "driver": 20, "s3_outage": 30,
            "mlflow_outage": 25}  # fmt: skip
_DOWNLOADS = 4  # at once: two encoders with two shards each
_SLOWEST = 15_000  # bytes per second of a download
_PROGRESS = {"embed": r"/part-\d+\.parquet$", "tat_train": r"/step-\d+/"}
_DIRTY: tuple[RawSample, ...] = (
    ("html", b"<html>not found</html>", "jpg", "a page"),
    ("empty", b"", "jpg", "nothing"),
    ("cut", b"\xff\xd8\xff\xe0\x00\x10JFIF", "jpg", "the first bytes of a picture"),
    ("png", b"\x89PNG\r\n\x1a\n", "png", "a signature alone"),
)
_NO_PAIRS = 1  # of them: without a byte of an image it is in no step; the others are, and count as bad
# Of a hundred HTTP faults; the three that take seconds are rarer.
_WEIGHTS = {"slow_down": 22, "burst": 8, "reset_before": 16, "reset_in_body": 14, "truncated": 14, "lost_reply": 12,
            "slow": 6, "stall": 8}  # fmt: skip
_LONG: dict[str, dict[str, int]] = {
    "embed-http": {},
    "embed-decoders": {"decode_worker": 5},
    "embed-encoders": {"encode_actor": 4},
    "embed-node": {"raylet": 2},
    "embed-driver": {"driver": 3},
    "embed-s3": {"s3_outage": 2},
    "embed-mlflow": {"mlflow_outage": 2},
    "embed-everything": {
        "decode_worker": 2, "encode_actor": 1, "raylet": 1, "driver": 1, "s3_outage": 1, "mlflow_outage": 1,
    },
    "tune-workers": {"train_worker": 3},
    "tune-everything": {"train_worker": 1, "raylet": 1, "driver": 1, "s3_outage": 1, "mlflow_outage": 1},
}  # fmt: skip
_SHORT: dict[str, dict[str, int]] = {"embed-short": {"decode_worker": 2, "encode_actor": 1}}
RUNS = {False: _LONG, True: _SHORT}
"""Runs and their kills by kind: of the whole campaign, and of the short one."""
_SHORT_HTTP = 16
_SHARES_WITHOUT_KILLS = 3  # of the HTTP faults, where a run with kills gets one


@dataclass(frozen=True)
class Data:
    """Where shards and results are."""

    shards: str
    num_shards: int
    root: str

    def result(self, job: str, name: str) -> str:
        """Return the URI of a run's result: an embedding store, or a tuning run's folder."""
        return f"{self.root}/stores/{name}" if job == "embed" else f"{self.root}/runs/tat_train/{name}"

    def num_rows(self, job: str) -> int:
        """Return how many rows a job has to account for: embedding lists its rejects, tuning the samples of its steps."""
        return self.num_shards * _SHARD_ROWS + len(_DIRTY) - (0 if job == "embed" else _NO_PAIRS)

    def settings(self, job: str, name: str) -> dict[str, Any]:
        """Return the job's command line."""
        common = {"data": self.shards, "model": "scenes-tiny", "storage_path": f"{self.root}/runs"}
        if job == "embed":
            own = {"output": self.result(job, name), "captions": "text", "num_encoders": 2, "batch_size": 32}
        else:
            own = {
                "name": name, "global_batch_size": 64, "gap_samples": 64, "checkpoint_every_steps": 4,
                "log_every_steps": 1, "record_samples": "true", "lr": 1e-3, "lora_dropout": 0,
            }  # fmt: skip
        return common | own


def make_data(lab: Lab, *, short: bool) -> Data:
    """Write the shards, some of them with rows that cannot be used, to the bucket."""
    num_shards = 12 if short else 48
    shards = lab.uri("chaos", "shards")
    write_pairs(shards, num_shards * _SHARD_ROWS, shard_rows=_SHARD_ROWS)
    write_tar_shard(f"{shards}/{num_shards:05d}.tar", _DIRTY)
    return Data(shards, num_shards, lab.uri("chaos"))


def http_faults(number: int, rng: random.Random) -> Counter[str]:
    """Return a stock of faults for the proxy: every kind in proportion to its weight, the rest at random."""
    total = sum(_WEIGHTS.values())
    stock = Counter({kind: number * weight // total for kind, weight in _WEIGHTS.items()})
    return stock + Counter(rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=number - stock.total()))


def planned_runs(data: Data, options: argparse.Namespace) -> list[PlannedRun]:
    """Return the runs of a campaign: together at least options.faults faults, if all of them can be done."""
    chosen = RUNS[options.short]
    kills = sum(sum(counts.values()) for counts in chosen.values())
    http = _SHORT_HTTP if options.short else max(options.faults - kills, 0)
    rng = random.Random(options.seed)
    stock = list(http_faults(http, rng).elements())
    rng.shuffle(stock)
    shares = [name for name, counts in chosen.items() for _ in range(1 if counts else _SHARES_WITHOUT_KILLS)]
    runs = []
    for name, counts in chosen.items():
        order = [kind for kind, times in counts.items() for _ in range(times)]
        rng.shuffle(order)
        own = [kind for number, kind in enumerate(stock) if shares[number % len(shares)] == name]
        if not options.only or name in options.only:
            runs.append(_run(data, name, order, Counter(own), options.seed))
    return runs


def _run(data: Data, name: str, kills: Sequence[str], http: Counter[str], seed: int) -> PlannedRun:
    job = "embed" if name.startswith("embed") else "tat_train"
    return PlannedRun(
        name=name, job=job, settings=data.settings(job, name), progress=_PROGRESS[job], kills=tuple(kills), http=http,
        pace=_pace(data, kills), seed=seed,
    )  # fmt: skip


def _pace(data: Data, kills: Sequence[str]) -> float:
    """Return the bytes per second of a download with which the data last until all kills are done; 0 = no limit."""
    seconds = sum(_SECONDS[kind] for kind in kills)
    return max(data.num_shards * _SHARD_BYTES / _DOWNLOADS / seconds, _SLOWEST) if seconds else 0.0


def reference_run(data: Data, job: str) -> PlannedRun:
    """Return the fault-free run."""
    return PlannedRun(name="reference", job=job, settings=data.settings(job, "reference"), progress=_PROGRESS[job])


def top_up(data: Data, seed: int, number: int, missing: int) -> PlannedRun:
    """Return one more embedding run with the HTTP faults that the others had no chance to do."""
    stock = http_faults(missing, random.Random(f"{seed}:{number}"))
    return _run(data, f"embed-top-up-{number + 1}", [], stock, seed + number + 1)


assert set(_WEIGHTS) == set(ALL_KINDS), "every kind of fault has its weight"
