"""When an embedding run has rejected so much that it stops: judged as parts end, by the driver, and inside one, by its actor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from cir_core import files
from cir_core.embedding_store import PartInfo
from cir_core.schema import CirError, Reject

_SHOWN = 5  # rejects that a message names
_ENOUGH_ROWS = 1000  # before a share means anything while the run lasts
_MOST_READ = 1000  # parts whose reasons a message counts
_READERS = 32  # of them at once


class RejectLimit:
    """Counts a store's rows and stops the run when too many of them could not be used.

    max_rejects: how many, None for any number; max_share: which share, judged from the first thousand rows on.
    """

    def __init__(self, output: str, max_rejects: int | None, max_share: float) -> None:
        self.output, self.max_rejects, self.max_share = output, max_rejects, max_share
        self.rows, self.rejects = 0, 0
        self._with_rejects: list[str] = []

    def count(self, part: PartInfo) -> None:
        """Take in a finished part."""
        self.rows, self.rejects = self.rows + part.num_rows, self.rejects + part.num_rejects
        if part.num_rejects and len(self._with_rejects) < _MOST_READ:
            self._with_rejects.append(files.join(self.output, "rejects", f"{part.name}.parquet"))

    def judge(self, parts: Iterable[PartInfo]) -> None:
        """Raise CirError if these parts, all of a store's, are above the limit."""
        self.rows, self.rejects, self._with_rejects = 0, 0, []
        for part in parts:
            self.count(part)
        self.check(final=True)

    def check(self, *, final: bool = False) -> None:
        """Raise CirError above the limit. final: nothing is to come, so that a share of few rows counts too."""
        self._check(self.rows, self.rejects, enough=0 if final else _ENOUGH_ROWS)

    def check_part(
        self, num_rows: int, rejects: Sequence[Reject], totals: Callable[[], Mapping[str, float] | None]
    ) -> None:
        """Raise CirError if a part that is being written brings the store above the limit.

        num_rows, rejects: of the part so far. totals: rows and rejects of all parts since those counted here, this one
        included; None if nobody knows. It is asked only where the part's own share is too large.
        """
        if self.max_rejects is not None and self.rejects + len(rejects) > self.max_rejects:
            self._check(self.rows + num_rows, self.rejects + len(rejects), rejects)
        seen = num_rows + len(rejects)
        if seen >= _ENOUGH_ROWS and len(rejects) > self.max_share * seen and (found := totals()) is not None:
            rows, rejected = (int(found.get(name, 0)) for name in ("rows", "rejects"))
            self._check(self.rows + rows, self.rejects + rejected, rejects)

    def _check(self, rows: int, rejected: int, own: Sequence[Reject] = (), *, enough: int = _ENOUGH_ROWS) -> None:
        """own: rejects that are in no file yet."""
        seen = rows + rejected
        too_many = self.max_rejects is not None and rejected > self.max_rejects
        if not (too_many or (seen >= enough and rejected > self.max_share * seen)):
            return
        limit = f"{self.max_rejects}" if too_many else f"share of {self.max_share:g}"
        with ThreadPoolExecutor(_READERS) as pool:
            counted = Counter(reject.reason for reject in own)
            for found in pool.map(_reasons, self._with_rejects):
                counted.update(found)
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counted.most_common(5))
        some = [_described(reject) for reject in own[:_SHOWN]] or some_rejects(self._with_rejects)
        raise CirError(
            f"{rejected} of {seen} images cannot be used, more than the {limit} allowed; {files.redact(self.output)} is "
            f"not used. {f'Reasons: {reasons}. ' if reasons else ''}Such as {'; '.join(some)}. "
            "Repair or remove them at the source, or allow more: what is done stays done"
        )


def some_rejects(uris: Iterable[str]) -> list[str]:
    """Name some of the rows in these files of rejects, with their reasons."""
    found: list[str] = []
    for uri in uris:
        with files.open_parquet(uri, "rejects") as file:
            found += [_described(Reject(**row)) for row in file.read().slice(0, _SHOWN).to_pylist()]
        if len(found) >= _SHOWN:
            break
    return found[:_SHOWN]


def _described(reject: Reject) -> str:
    return f"{reject.shard} {reject.key} ({reject.reason} {reject.detail})"


def _reasons(uri: str) -> Counter[str]:
    with files.open_parquet(uri, "rejects") as file:
        reasons = file.read(columns=["reason"]).column("reason").value_counts().to_pylist()
    return Counter({row["values"]: row["counts"] for row in reasons})
