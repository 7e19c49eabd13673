"""Captions of gallery images, for composing them with their pictures: a file of ids and texts."""

from __future__ import annotations

import json
from collections.abc import Iterator

from cir_core import files
from cir_core.benchmarks.annotations import Row
from cir_core.benchmarks.query_files import iter_lines
from cir_core.schema import CirError


def read_captions(uri: str) -> dict[str, str]:
    """Return {image id: caption} of a file: JSON Lines or Parquet with an `id` and a `caption` (strings) a row.

    An empty caption counts as none. Raises CirError naming the row for anything else and for an id listed twice.
    """
    found: dict[str, str] = {}
    for row in _parquet_rows(uri) if files.redact(uri).lower().endswith(".parquet") else _json_rows(uri):
        name = row.name("id")
        if name in found:
            raise CirError(f"{row.where}: image {name!r} has a caption already")
        found[name] = row.text("caption", may_be_empty=True)
    if not found:
        raise CirError(f"{files.redact(uri)}: no captions in this file")
    return found


def _json_rows(uri: str) -> Iterator[Row]:
    with files.open_stream(uri) as stream:
        for number, line in enumerate(iter_lines(stream, files.redact(uri)), start=1):
            where = f"{files.redact(uri)}, line {number}"
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise CirError(f"{where}: not a JSON object ({error})") from None
            if not isinstance(value, dict):
                raise CirError(f"{where}: expected a JSON object with 'id' and 'caption', found {value!r:.80}")
            yield Row(where, value)


def _parquet_rows(uri: str) -> Iterator[Row]:
    with files.open_parquet(uri, "captions") as file:
        for name in ("id", "caption"):
            if name not in file.schema_arrow.names:
                raise CirError(f"{files.redact(uri)}: no column {name!r}; it has {file.schema_arrow.names}")
        number = 1
        for batch in file.iter_batches(columns=["id", "caption"]):
            for value in batch.to_pylist():
                yield Row(f"{files.redact(uri)}, row {number}", value)
                number += 1
