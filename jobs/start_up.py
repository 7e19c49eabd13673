"""How long a job takes from the start of its process to its first result, stage by stage: said, and kept with the results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import psutil


class StartUp:
    """Moments of a start in order: names, and seconds since the epoch. They may be taken in several processes.

    On several machines a stage that ends on another one is off by the difference of their clocks.
    """

    def __init__(self, moments: Sequence[tuple[str, float]] = ()) -> None:
        self.moments = list(moments) or [("process", psutil.Process().create_time())]

    def reached(self, stage: str) -> None:
        """Take the time at which `stage` is done."""
        self.moments.append((stage, time.time()))

    def seconds(self) -> dict[str, float]:
        """Return what each stage took since the one before, and "total"."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        taken = {name: round(end - start, 3) for (_, start), (name, end) in pairs}
        return {**taken, "total": round(self.moments[-1][1] - self.moments[0][1], 3)}

    def record(self) -> dict[str, Any]:
        """Return what a run's results keep: when its process began, and the stages; pairs, as JSON files sort their keys."""
        return {
            "process_began": self.moments[0][1],
            "start_up": [[name, spent] for name, spent in self.seconds().items()],
        }

    def __str__(self) -> str:
        """Return one line, the stages that took part of a second left out."""
        taken = self.seconds()
        total = taken.pop("total")
        return f"{total:.1f} s ({', '.join(f'{name} {spent:.1f}' for name, spent in taken.items() if spent >= 0.1)})"
