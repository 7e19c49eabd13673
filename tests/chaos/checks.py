"""Compares what a run under faults left behind with what the fault-free run did, row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load

from cir_core import files
from cir_core.embedding_store import EmbeddingStore
from cir_core.schema import CirError

_TOLERANCE = 1e-5  # of adapters; embeddings must be equal to the bit


@dataclass
class Check:
    """What a comparison found. lost, duplicates: rows; problems: everything that is wrong, in words."""

    rows: int = 0
    lost: int = 0
    duplicates: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not (self.lost or self.duplicates or self.problems)

    def count(self, expected: Iterable[Hashable], found: Sequence[Hashable]) -> None:
        """Count lost and duplicate rows, and rows that should not be there at all."""
        wanted, there = Counter(expected), Counter(found)
        self.rows += len(found)
        self.lost += (wanted - there).total()
        self.duplicates += sum(number - max(wanted[row], 1) for row, number in there.items() if number > 1)
        strangers = sorted(str(row) for row in there.keys() - wanted.keys())
        if strangers:
            self.problems.append(f"{len(strangers)} rows that the fault-free run has not, such as {strangers[0]}")


def compare_stores(expected_uri: str, found_uri: str) -> Check:
    """Compare two committed stores: ids and their order, captions, embeddings, rejects, counts, and every checksum."""
    check = Check()
    try:
        expected, found = EmbeddingStore.open(expected_uri), EmbeddingStore.open(found_uri)
        check.problems += found.verify()
        rows, rows_found = _rows(expected), _rows(found)
        rejects, rejects_found = _rejects(expected), _rejects(found)
    except CirError as error:
        check.problems.append(str(error))
        return check
    check.count(rows["id"].to_pylist(), rows_found["id"].to_pylist())
    check.count(map(_hashable, rejects), list(map(_hashable, rejects_found)))
    for name in rows.column_names:
        if not rows[name].equals(rows_found[name]):
            check.problems.append(f"column {name} differs from the fault-free store's")
    if rejects != rejects_found:
        check.problems.append("the rejects differ from the fault-free store's")
    counts = [_counts(store) for store in (expected, found)]
    if counts[0] != counts[1]:
        check.problems.append(f"the manifest counts {counts[1]}, the fault-free one {counts[0]}")
    return check


def _counts(store: EmbeddingStore) -> dict[str, Any]:
    manifest = store.manifest
    parts = [(part.name, part.num_rows, part.num_rejects) for part in manifest.parts]
    return {"rows": manifest.num_rows, "rejects": manifest.num_rejects, "columns": manifest.columns, "parts": parts}


def _rows(store: EmbeddingStore) -> pa.Table:
    """Return all rows, as the Parquet files hold them: by pyarrow alone, as any reader would."""
    return pa.concat_tables(_table(files.join(store.uri, f"{part.name}.parquet")) for part in store.parts)


def _rejects(store: EmbeddingStore) -> list[dict[str, Any]]:
    uris = [files.join(store.uri, "rejects", f"{part.name}.parquet") for part in store.parts]
    return [row for uri in uris for row in _table(uri).to_pylist()]


def _table(uri: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(files.read_bytes(uri)))


def _hashable(row: dict[str, Any]) -> Hashable:
    return tuple(sorted((key, str(value)) for key, value in row.items()))


def compare_trainings(expected_uri: str, found_uri: str) -> Check:
    """Compare two finished tuning runs: steps, the samples of every step, counts of rejects, losses, adapter."""
    check = Check()
    try:
        results = [files.read_json(files.join(uri, "result.json")) for uri in (expected_uri, found_uri)]
        samples = [_samples(uri) for uri in (expected_uri, found_uri)]
        adapters = [
            load(files.read_bytes(files.join(uri, "adapter", "adapter_model.safetensors")))
            for uri in (expected_uri, found_uri)
        ]
    except CirError as error:
        check.problems.append(str(error))
        return check
    check.count(samples[0], samples[1])
    for key in ("steps", "samples_seen", "rejects_images", "rejects_structural"):
        values = [result[key] for result in results]
        if values[0] != values[1]:
            check.problems.append(f"{key}: {values[1]}, the fault-free run has {values[0]}")
    losses = [[(row["step"], row["loss"]) for row in result["history"]] for result in results]
    if [step for step, _ in losses[0]] != [step for step, _ in losses[1]]:
        check.problems.append(f"the history has {len(losses[1])} entries, the fault-free one {len(losses[0])}")
    elif not np.allclose(losses[0], losses[1], atol=_TOLERANCE):
        check.problems.append("the losses differ from the fault-free run's")
    if adapters[0].keys() != adapters[1].keys():
        check.problems.append("the adapter has other tensors than the fault-free run's")
    else:
        away = max(float(np.abs(adapters[0][name] - adapters[1][name]).max()) for name in adapters[0])
        if not away <= _TOLERANCE:
            check.problems.append(f"the adapter differs by {away:g} from the fault-free run's")
    return check


def _samples(uri: str) -> list[tuple[Any, ...]]:
    """Return (step, shard, key) of every sample that training recorded."""
    found = sorted(files.list_files(files.join(uri, "samples")), key=lambda item: item.name)
    return [tuple(row.values()) for item in found for row in _table(item.uri).to_pylist()]
