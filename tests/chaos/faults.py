"""Which request gets which fault: a seeded plan with a fixed number of each kind, and the record of what was done."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

BURST = 6  # replies of one burst: more than the three requests with which pyarrow's client gives up
SLOW_S = 6.0  # how long a slow body takes at least
STALL_S = 6.0  # silence of a stalled connection: twice the client's patience of 3 s

_EVERY = ("slow_down", "burst", "reset_before")
KINDS: dict[str, tuple[str, ...]] = {
    "GET": (*_EVERY, "reset_in_body", "slow", "stall", "truncated"),
    "PUT": (*_EVERY, "reset_in_body", "slow", "stall", "lost_reply"),
    "HEAD": (*_EVERY, "stall", "lost_reply"),
    "DELETE": (*_EVERY, "lost_reply"),
    "POST": (*_EVERY, "lost_reply"),
}
"""The faults that make sense for each method.

slow_down: 503 with S3's XML. burst: BURST of them in a row on one object. reset_before: a TCP reset instead of a reply.
reset_in_body: a reset in the middle of the body (of the reply, or of the upload). slow: a body that trickles. stall: half of
the body, then silence, then a reset. truncated: an orderly end after half of the promised body. lost_reply: the server
has done what was asked, and its reply is replaced by a reset.
"""
ALL_KINDS = tuple(dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds))


@dataclass(frozen=True)
class Fault:
    """One fault of one request. number: 1, or the place in a burst."""

    kind: str
    method: str
    path: str
    number: int = 1


@dataclass
class FaultPlan:
    """Draws faults from a stock until it is empty. Equal seeds and equal requests give equal faults.

    Args:
        stock: how many of each kind are to be done.
        rate: share of the requests that get one while there are any.
        seed: decides, with method, path and how often that was asked for before; not the order of concurrent requests.
    """

    stock: Counter[str] = field(default_factory=Counter)
    rate: float = 0.0
    seed: int = 0
    done: list[tuple[float, Fault]] = field(default_factory=list)
    _asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    _bursts: Counter[tuple[str, str]] = field(default_factory=Counter)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FaultPlan:
        """Build from what the control address gets: faults, rate, seed. ValueError names an unknown kind."""
        stock = Counter({str(kind): int(number) for kind, number in value.get("faults", {}).items()})
        unknown = sorted(set(stock) - set(ALL_KINDS))
        if unknown:
            raise ValueError(f"unknown faults {unknown}; known: {', '.join(ALL_KINDS)}")
        return cls(stock=stock, rate=float(value.get("rate", 0.0)), seed=int(value.get("seed", 0)))

    def draw(self, method: str, path: str) -> Fault | None:
        """Return the fault for this request, or None, and take it out of the stock; it counts once `record` is called."""
        asked = (method, path)
        self._asked[asked] += 1
        if self._bursts[asked]:
            self._bursts[asked] -= 1
            return Fault("burst", method, path, BURST - self._bursts[asked])
        kinds = [kind for kind in KINDS.get(method, ()) if self.stock[kind] > 0]
        rng = random.Random(f"{self.seed}:{method}:{path}:{self._asked[asked]}")
        if not kinds or rng.random() >= self.rate:
            return None
        kind = rng.choices(kinds, [self.stock[kind] for kind in kinds])[0]
        self.stock[kind] -= 1
        if kind == "burst":
            self._bursts[asked] = BURST - 1
        return Fault(kind, method, path)

    def give_back(self, fault: Fault) -> None:
        """Return a fault to the stock that could not be done, such as half of an empty body."""
        self.stock[fault.kind] += 1

    def record(self, fault: Fault) -> None:
        """Count a fault that was done."""
        self.done.append((time.time(), fault))

    def report(self) -> dict[str, Any]:
        """Return what was done and what is left, as JSON. A burst counts as one fault, its replies are all listed."""
        counts = Counter(fault.kind for _, fault in self.done if fault.number == 1)
        return {
            "counts": dict(counts),
            "left": {kind: number for kind, number in self.stock.items() if number},
            "requests": sum(self._asked.values()),
            "done": [{"at": at, **asdict(fault)} for at, fault in self.done],
        }
