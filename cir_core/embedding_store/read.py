"""Read a committed store: blocks in row order, ids, single rows, and a check of everything."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cir_core import files
from cir_core.embedding_store.manifest import Manifest, PartInfo
from cir_core.schema import CirError, Reject

Embeddings = npt.NDArray[np.float32] | npt.NDArray[np.float16]
_ID_BATCH_ROWS = 65_536
_READERS = 8  # parts of which embeddings are read at once, a row group of each


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a store. offset: global index of the first; embeddings: [n, D], read-only.

    columns: the asked-for columns; string columns as lists, caption_embedding as an array [n, D].
    """

    offset: int
    id_array: pa.Array
    embeddings: Embeddings
    columns: Mapping[str, list[str | None] | Embeddings]

    @property
    def ids(self) -> list[str]:
        """The ids as Python strings."""
        ids: list[str] = self.id_array.to_pylist()
        return ids


class EmbeddingStore:
    """A committed store, opened for reading. Use `EmbeddingStore.open`."""

    def __init__(self, uri: str, manifest: Manifest) -> None:
        self.uri, self.manifest = uri, manifest

    @classmethod
    def open(cls, uri: str) -> EmbeddingStore:
        """Open a store; CirError if it was never committed or its manifest is damaged."""
        manifest_uri = files.join(uri, "manifest.json")
        if not files.exists(manifest_uri):
            started = files.exists(files.join(uri, "_progress"))
            state = "was started and not committed: run the job that writes it again" if started else "does not exist"
            raise CirError(f"{files.redact(uri)}: this embedding store {state} (no manifest.json)")
        return cls(uri, Manifest.from_json(files.read_json(manifest_uri), files.redact(manifest_uri)))

    @property
    def num_rows(self) -> int:
        """Number of embeddings."""
        return self.manifest.num_rows

    @property
    def identity(self) -> str:
        """The identity of what made the store."""
        return self.manifest.identity

    @property
    def parts(self) -> tuple[PartInfo, ...]:
        """The parts, in row order."""
        return self.manifest.parts

    def _part_uri(self, part: PartInfo) -> str:
        return files.join(self.uri, f"{part.name}.parquet")

    def _rejects_uri(self, part: PartInfo) -> str:
        return files.join(self.uri, "rejects", f"{part.name}.parquet")

    @cached_property
    def _places(self) -> dict[int, tuple[int, PartInfo]]:
        """Part number -> global offset of its first row, and the part."""
        ends = itertools.accumulate((part.num_rows for part in self.parts), initial=0)
        return {part.index: (offset, part) for offset, part in zip(ends, self.parts, strict=False)}

    def _chosen(self, parts: Sequence[int] | None) -> Iterator[tuple[int, PartInfo]]:
        """Yield the global offset of each chosen part with the part, in row order; empty parts are left out."""
        unknown = set(parts or ()) - self._places.keys()
        if unknown:
            raise CirError(
                f"{files.redact(self.uri)} has parts 0 to {len(self.parts) - 1}; asked for {sorted(unknown)}"
            )
        for index in self._places if parts is None else sorted(set(parts)):
            offset, part = self._places[index]
            if part.num_rows:
                yield offset, part

    def iter_blocks(
        self, block_rows: int = 65_536, parts: Sequence[int] | None = None, columns: Sequence[str] = ()
    ) -> Iterator[Block]:
        """Yield all rows, or those of the given parts, in row order, in blocks of at most `block_rows` rows.

        A block never spans two parts; embeddings are used as Arrow read them, without a copy.
        Raises CirError for a column or part that does not exist and for a damaged part.
        """
        unknown = [column for column in columns if column not in self.manifest.columns]
        if unknown:
            raise CirError(f"{files.redact(self.uri)}: no column {unknown[0]!r}; it has {self.manifest.columns}")
        if block_rows < 1:
            raise CirError(f"block_rows must be at least 1, not {block_rows}")
        for offset, part in self._chosen(parts):
            with files.open_parquet(self._part_uri(part), "part") as file:
                for batch in file.iter_batches(block_rows, columns=["id", "embedding", *columns]):
                    extra = {column: _values(batch.column(column)) for column in columns}
                    yield Block(offset, batch.column("id"), _matrix(batch.column("embedding")), extra)
                    offset += batch.num_rows

    def iter_ids(self, parts: Sequence[int] | None = None) -> Iterator[tuple[int, pa.Array]]:
        """Yield (global offset, ids) of all parts, or of the given ones, in row order, without reading embeddings."""
        for offset, part in self._chosen(parts):
            with files.open_parquet(self._part_uri(part), "part") as file:
                for batch in file.iter_batches(_ID_BATCH_ROWS, columns=["id"]):
                    yield offset, batch.column("id")
                    offset += batch.num_rows

    def read_ids(self) -> list[str]:
        """Return every id in row order. For large stores use iter_ids, ids_at or IdIndex."""
        return [one for _, ids in self.iter_ids() for one in ids.to_pylist()]

    def parts_of(self, rows: npt.NDArray[np.integer[Any]]) -> list[int]:
        """Return the numbers of the parts that hold any of these global rows, rising; CirError for a row there is not."""
        flat = np.asarray(rows).reshape(-1)
        if flat.size and not (flat.min() >= 0 and flat.max() < self.num_rows):
            raise CirError(f"{files.redact(self.uri)}: row numbers must lie in [0, {self.num_rows})")
        ends = np.cumsum([part.num_rows for part in self.parts], dtype=np.int64)
        return [self.parts[place].index for place in np.unique(np.searchsorted(ends, flat, "right"))]

    def ids_at(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.object_]:
        """Return the ids of global row numbers as an object array of the same shape; reads the parts that hold one.

        Raises CirError for a row there is not and for a damaged part.
        """
        flat = np.asarray(rows).reshape(-1)
        order = np.argsort(flat, kind="stable")
        found = np.empty(flat.size, dtype=object)
        for offset, ids in self.iter_ids(self.parts_of(flat)):
            low, high = np.searchsorted(flat[order], [offset, offset + len(ids)])
            chosen = order[low:high]
            found[chosen] = ids.take(pa.array(flat[chosen] - offset)).to_pylist()
        return found.reshape(np.shape(rows))

    def embeddings_at(self, rows: npt.NDArray[np.integer[Any]]) -> Embeddings:
        """Return the embeddings [n, D] of global row numbers [n]; reads only the row groups that hold one.

        Raises CirError for a row there is not and for a damaged part.
        """
        found = np.empty((len(rows), self.manifest.spec.dim), self.manifest.spec.dtype)

        def read(index: int) -> None:
            start, part = self._places[index]
            with files.open_parquet(self._part_uri(part), "part") as file:
                for group in range(file.num_row_groups):
                    end = start + file.metadata.row_group(group).num_rows
                    here = np.flatnonzero((rows >= start) & (rows < end))
                    if here.size:
                        held = _matrix(file.read_row_group(group, columns=["embedding"]).column("embedding"))
                        found[here] = held[rows[here] - start]
                    start = end

        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(read, self.parts_of(rows)))
        return cast(Embeddings, found)

    def take(self, ids: Sequence[str]) -> Embeddings:
        """Return the embeddings [len(ids), D] of the given ids; reads every id, and only the row groups that hold one.

        Raises CirError naming the ids that the store does not hold. Who asks often: see IdIndex.
        """
        wanted = pa.array(list(dict.fromkeys(ids)), pa.string())
        places: dict[str, int] = {}
        for offset, held in self.iter_ids():
            here = np.flatnonzero(pc.is_in(held, value_set=wanted).to_numpy(zero_copy_only=False))
            places |= zip(held.take(pa.array(here)).to_pylist(), (offset + here).tolist(), strict=True)
        missing = sorted({one for one in ids if one not in places})
        if missing:
            shown = ", ".join(map(repr, missing[:5]))
            raise CirError(f"{files.redact(self.uri)}: {len(missing)} ids are not in the store, such as {shown}")
        return self.embeddings_at(np.array([places[one] for one in ids], np.int64))

    def read_rows(self, part: int, first: int, stop: int, columns: Sequence[str] = ()) -> Block:
        """Return rows [first, stop) of one part, counted within it; reads only the row groups that hold them.

        Raises CirError for a part, row or column that does not exist and for a damaged part.
        """
        offset, info = next(self._chosen([part]), (0, None))
        held = info.num_rows if info is not None else 0
        unknown = [column for column in columns if column not in self.manifest.columns]
        if info is None or unknown or not 0 <= first < stop <= held:
            raise CirError(
                f"{files.redact(self.uri)}: asked for rows [{first}, {stop}) of part {part} with the columns "
                f"{list(columns)}; it has {held} rows and the columns {self.manifest.columns}"
            )
        with files.open_parquet(self._part_uri(info), "part") as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            ends = np.cumsum(sizes, dtype=np.int64)
            if sum(sizes) != held:
                raise CirError(
                    f"unreadable part {files.redact(self._part_uri(info))}: {sum(sizes)} rows, manifest: {held}"
                )
            low, high = np.searchsorted(ends, [first, stop - 1], side="right")
            table = file.read_row_groups(list(range(low, high + 1)), columns=["id", "embedding", *columns])
            table = table.slice(first - int(ends[low]) + sizes[low], stop - first)
        extra = {column: _values(table.column(column).combine_chunks()) for column in columns}
        return Block(offset + first, table.column("id").combine_chunks(), _matrix(table.column("embedding")), extra)

    def iter_batches(self, block_rows: int = 16_384) -> Iterator[pa.RecordBatch]:
        """Yield all rows in row order as Arrow holds them, every column."""
        for _, part in self._chosen(None):
            with files.open_parquet(self._part_uri(part), "part") as file:
                yield from file.iter_batches(block_rows)

    def read_rejects(self, parts: Sequence[int] | None = None) -> Iterator[list[Reject]]:
        """Yield the rejects of each part, or of the given ones."""
        for part in self.parts if parts is None else [self.parts[index] for index in parts]:
            with files.open_parquet(self._rejects_uri(part), "rejects") as file:
                yield [Reject(**row) for row in file.read().to_pylist()]

    def verify(self, *, threads: int = 8) -> list[str]:
        """Read every file and return what is wrong in words; an empty list means the store is sound.

        threads: files read at once, each in pieces of a few megabytes.
        """
        with ThreadPoolExecutor(threads) as pool:
            problems = [problem for found in pool.map(self._problems, self.parts) for problem in found]
        expected = {f"{part.name}.parquet" for part in self.parts}
        listed = {file.name for file in files.list_files(self.uri, recursive=False)}
        problems += [f"{name}: not in the manifest" for name in sorted(listed - expected) if name.startswith("part-")]
        return problems

    def _problems(self, part: PartInfo) -> list[str]:
        try:
            digest, size = _digest(self._part_uri(part))
            if (digest, size) != (part.sha256, part.size_bytes):
                return [f"{part.name}: checksum {digest[:12]}, expected {part.sha256[:12]} ({size} bytes)"]
            problems = []
            with files.open_parquet(self._part_uri(part), "part") as file:
                if file.metadata.num_rows != part.num_rows:
                    problems.append(f"{part.name}: {file.metadata.num_rows} rows, manifest: {part.num_rows}")
            with files.open_parquet(self._rejects_uri(part), "rejects") as file:
                if file.metadata.num_rows != part.num_rejects:
                    problems.append(f"{part.name}: {file.metadata.num_rows} rejects, manifest: {part.num_rejects}")
            if not problems and (digest := _digest(self._rejects_uri(part))[0]) != part.rejects_sha256:
                problems.append(
                    f"{part.name}: rejects have checksum {digest[:12]}, expected {part.rejects_sha256[:12]}"
                )
        except CirError as error:
            return [f"{part.name}: {error}"]
        return problems


def _digest(uri: str) -> tuple[str, int]:
    """Return SHA-256 and size of a file."""
    with files.open_stream(uri) as stream:
        digest, size = hashlib.sha256(), 0
        while piece := stream.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size


def _matrix(column: pa.Array) -> Embeddings:
    """Return a fixed-size-list column as an array [n, D], without a copy."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    matrix: Embeddings = column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), column.type.list_size)
    return matrix


def _values(column: pa.Array) -> list[str | None] | Embeddings:
    if pa.types.is_fixed_size_list(column.type):
        return _matrix(column)
    texts: list[str | None] = column.to_pylist()
    return texts
