"""What an embedding run says of itself while it lasts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.progress import UnitGauge, describe_stages, stage_shares
from jobs.session import say
from jobs.tracking import LiveMetrics, Tracker


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
