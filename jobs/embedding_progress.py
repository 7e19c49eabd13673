"""What an embedding run says of itself while it lasts, and when it has rejected so much that it stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from cir_core import files
from cir_core.embedding_store import PartInfo
from cir_core.schema import CirError
from jobs.progress import UnitGauge, describe_stages, stage_shares
from jobs.session import say
from jobs.tracking import LiveMetrics, Tracker

_SHOWN = 5  # rejects that a message names
_ENOUGH_ROWS = 1000  # before a share means anything while the run lasts


class RejectLimit:
    """Counts a store's rows and stops the run when too many of them could not be used.

    max_rejects: how many, None for any number; max_share: which share, judged from the first thousand rows on.
    """

    def __init__(self, output: str, max_rejects: int | None, max_share: float) -> None:
        self.output, self.max_rejects, self.max_share = output, max_rejects, max_share
        self.rows, self.rejects = 0, 0
        self.reasons: Counter[str] = Counter()
        self._with_rejects: list[str] = []

    def count(self, part: PartInfo, reasons: Mapping[str, int] | None = None) -> None:
        """Take in a finished part."""
        self.rows, self.rejects = self.rows + part.num_rows, self.rejects + part.num_rejects
        if part.num_rejects and len(self._with_rejects) < _SHOWN:
            self._with_rejects.append(files.join(self.output, "rejects", f"{part.name}.parquet"))
        self.reasons.update(reasons or {})

    def judge(self, parts: Iterable[PartInfo]) -> None:
        """Raise CirError if these parts, all of a store's, are above the limit."""
        self.rows, self.rejects, self._with_rejects = 0, 0, []
        for part in parts:
            self.count(part)
        self.check(final=True)

    def check(self, *, final: bool = False) -> None:
        """Raise CirError above the limit. final: nothing is to come, so that a share of few rows counts too."""
        rejected, seen = self.rejects, self.rows + self.rejects
        too_many = self.max_rejects is not None and rejected > self.max_rejects
        too_large = (final or seen >= _ENOUGH_ROWS) and rejected > self.max_share * seen
        if not (too_many or too_large):
            return
        limit = f"{self.max_rejects}" if too_many else f"share of {self.max_share:g}"
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common(5))
        raise CirError(
            f"{rejected} of {seen} images cannot be used, more than the {limit} allowed; {files.redact(self.output)} is "
            f"not used. {f'Reasons: {reasons}. ' if reasons else ''}Such as {'; '.join(some_rejects(self._with_rejects))}. "
            "Repair or remove them at the source, or allow more: what is done stays done"
        )


def some_rejects(uris: Iterable[str]) -> list[str]:
    """Name some of the rows in these files of rejects, with their reasons."""
    found: list[str] = []
    for uri in uris:
        with files.open_parquet(uri, "rejects") as file:
            for row in file.read().to_pylist():
                found.append(f"{row['shard']} {row['key']} ({row['reason']} {row['detail']})")
        if len(found) >= _SHOWN:
            break
    return found[:_SHOWN]


class EmbeddingProgress:
    """Turns the totals of a run into a line, MLflow metrics (step: seconds since the start) and Ray gauges."""

    def __init__(self, num_units: int, tracker: Tracker | None) -> None:
        self._num_units, self._finished = num_units, 0
        self._idle_s = 0.0  # before the first rows: encoders start and load the model
        self._live = LiveMetrics(tracker.uri, tracker.run_id, marker="images_per_second") if tracker else None
        self._shards = UnitGauge("embed", "shards")

    def finished_unit(self) -> None:
        """Count a part that is on storage."""
        self._finished += 1

    def __enter__(self) -> EmbeddingProgress:
        self._shards.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._shards.__exit__(*error)
        if self._live is not None:
            self._live.close()

    def show(self, elapsed_s: float, totals: Mapping[str, float]) -> None:
        """Say how far the run is; called from the reporter's thread."""
        self._shards.show(self._finished, self._num_units)
        found = {name: totals.get(name, 0.0) for name in ("rows", "rejects", "megabytes")}
        if not (found["rows"] or found["rejects"] or self._finished):
            if not self._idle_s:
                say("encoders are starting and loading the model")
            self._idle_s = elapsed_s
            return
        busy_s = elapsed_s - self._idle_s
        shares = stage_shares(totals)
        row: dict[str, Any] = {
            **found,
            "images_per_second": found["rows"] / busy_s,
            "megabytes_per_second": found["megabytes"] / busy_s,
            "shards_done": self._finished,
            **{f"time_share/{stage}": share for stage, share in shares.items()},
        }
        if self._live is not None and totals:
            self._live.log(int(elapsed_s), row)
        left = self._num_units - self._finished
        eta = f"  ETA {busy_s / self._finished * left:.0f} s" if self._finished else ""
        say(
            f"embedded {self._finished}/{self._num_units} shards ({100 * self._finished / self._num_units:.0f} %)  "
            f"{found['rows']:.0f} rows  {row['images_per_second']:.0f} images/s  "
            f"{row['megabytes_per_second']:.1f} MB/s  {found['rejects']:.0f} rejects{eta}  {describe_stages(shares)}"
        )
