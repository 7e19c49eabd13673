"""One part of a store, written batch by batch: what is in memory does not grow with the part, but for its ids."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cir_core.embedding_store.manifest import PartInfo, StoreSpec
from cir_core.schema import CirError, Reject, embedding_schema

_NORM_TOLERANCE = 1e-3  # float32 rounding is 1e-6; a vector that was never normalised is off by far more


class HashingSink:
    """Passes on what is written and knows its SHA-256 and size. Also what ParquetWriter wants of a file."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink, self._digest, self.size_bytes = sink, hashlib.sha256(), 0
        self.closed = False

    def write(self, data: bytes | pa.Buffer) -> int:
        """Write and count."""
        self._digest.update(data)
        self.size_bytes += len(memoryview(data))
        return self._sink.write(data)

    def tell(self) -> int:
        """Return the bytes written."""
        return self.size_bytes

    def flush(self) -> None:
        """Flush what lies below."""
        self._sink.flush()

    def close(self) -> None:
        """Leave the file below open: its owner decides when it is whole."""

    @property
    def sha256(self) -> str:
        """In hexadecimal."""
        return self._digest.hexdigest()


def part_schema(spec: StoreSpec, columns: Sequence[str], *, caption_embeddings: bool) -> pa.Schema:
    """Return the Arrow schema of a part; CirError for a column name that is taken."""
    taken = {"id", "embedding", "caption_embedding"} & set(columns)
    if taken:
        raise CirError(f"the column name {taken.pop()!r} is taken")
    schema = embedding_schema(spec.dim, spec.dtype, list(columns))
    if caption_embeddings:
        schema = schema.insert(2, pa.field("caption_embedding", schema.field("embedding").type))
    return schema


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Return how parts are stored: float vectors do not compress, statistics of single numbers or ids help nobody."""
    vectors = {name for name in schema.names if pa.types.is_fixed_size_list(schema.field(name).type)}
    paths = {f"{name}.list.element" if name in vectors else name: name for name in schema.names}
    compression = {path: "none" if name in vectors else "zstd" for path, name in paths.items()}
    return {"compression": compression, "use_dictionary": False, "write_statistics": False}


class PartWriter:
    """Takes the rows of one part in order; made by `EmbeddingWriter.part`. info: set once the part is finished."""

    def __init__(
        self, name: str, spec: StoreSpec, schema: pa.Schema, parquet: pq.ParquetWriter, *, row_group_rows: int
    ) -> None:
        self.name, self.spec, self.schema = name, spec, schema
        self.num_rows = 0
        self.rejects: list[Reject] = []
        self.info: PartInfo | None = None
        self._parquet, self._row_group_rows = parquet, row_group_rows
        self._waiting: list[pa.RecordBatch] = []
        self._ids: set[str] = set()

    def add(
        self,
        ids: Sequence[str],
        embeddings: npt.NDArray[np.float32],
        *,
        columns: Mapping[str, Sequence[str | None]] | None = None,
        caption_embeddings: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Append N rows. embeddings, caption_embeddings: float32[N, D], unit norm; columns: more columns of N strings.

        Raises CirError for anything else, and for an id that is empty or was there before.
        """
        self._check_ids(ids)
        given: dict[str, Any] = {"embedding": embeddings, **(columns or {})}
        if caption_embeddings is not None:
            given["caption_embedding"] = caption_embeddings
        if given.keys() != set(self.schema.names) - {"id"}:
            raise CirError(f"{self.name}: given {', '.join(given)}, expected {', '.join(self.schema.names[1:])}")
        arrays = [pa.array(list(ids), pa.string())]
        arrays += [self._array(column, given[column], len(ids)) for column in self.schema.names[1:]]
        self._take(pa.record_batch(arrays, schema=self.schema))

    def _take(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        self.num_rows += batch.num_rows
        self._write_row_groups(self._row_group_rows)

    def copy(self, batch: pa.RecordBatch, *, leave_out: Collection[str]) -> None:
        """Append rows of another part as they are stored, but for some ids."""
        kept = batch.filter(pc.invert(pc.is_in(batch.column("id"), value_set=pa.array(list(leave_out), pa.string()))))
        self._check_ids(kept.column("id").to_pylist())
        self._take(kept.cast(self.schema))

    def reject(self, rejects: Iterable[Reject]) -> None:
        """Count rows of the input that gave no embedding."""
        self.rejects += rejects

    def end(self) -> None:
        """Write the rows that wait for a whole row group."""
        self._write_row_groups(1)

    def _write_row_groups(self, least: int) -> None:
        """Write row groups of `row_group_rows` rows while at least `least` rows wait: the same bytes for any batches."""
        if sum(batch.num_rows for batch in self._waiting) < least:
            return
        table = pa.Table.from_batches(self._waiting, self.schema)
        start = 0
        while table.num_rows - start >= least:
            group = table.slice(start, self._row_group_rows).combine_chunks()
            self._parquet.write_table(group, row_group_size=self._row_group_rows)
            start += group.num_rows
        self._waiting = table.slice(start).to_batches()

    def _check_ids(self, ids: Sequence[str]) -> None:
        if not all(isinstance(one, str) and one for one in ids):
            raise CirError(f"{self.name}: every id must be a string that is not empty")
        for one in ids:
            if one in self._ids:
                raise CirError(f"{self.name}: the id {one!r} occurs twice")
            self._ids.add(one)

    def _array(self, column: str, values: Any, num_rows: int) -> pa.Array:
        kind = self.schema.field(column).type
        if pa.types.is_fixed_size_list(kind):
            _check_vectors(f"{self.name}: {column}", values, num_rows, self.spec.dim)
            flat = np.ascontiguousarray(values, dtype=self.spec.dtype).reshape(-1)
            return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind)
        if len(values) != num_rows:
            raise CirError(f"{self.name}: column {column!r} has {len(values)} values for {num_rows} ids")
        return pa.array(values, pa.string())


def _check_vectors(name: str, vectors: npt.NDArray[Any], num_rows: int, dim: int) -> None:
    if vectors.dtype != np.float32 or vectors.shape != (num_rows, dim):
        raise CirError(f"{name}: expected float32[{num_rows}, {dim}], found {vectors.dtype}{list(vectors.shape)}")
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    bad = np.flatnonzero(~(np.abs(norms - 1) <= _NORM_TOLERANCE))
    if bad.size:
        raise CirError(
            f"{name}: {bad.size} of {num_rows} rows are not finite unit vectors; row {bad[0]} has norm {norms[bad[0]]}"
        )
