"""Write the parts of a store and commit them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cir_core import files
from cir_core.embedding_store.manifest import Manifest, PartInfo, StoreSpec, part_info, part_name
from cir_core.embedding_store.part import HashingSink, PartWriter, parquet_options, part_schema
from cir_core.embedding_store.read import EmbeddingStore
from cir_core.embedding_store.unique import find_duplicates
from cir_core.schema import REJECT_SCHEMA, CirError, Reject

ROW_GROUP_ROWS = 16_384
"""32 MiB of float32[512]: what take() reads for one id, and what a writer holds."""
_READERS = 32  # requests in flight while many small files are read
_MARKERS = 1024  # read at once


class EmbeddingWriter:
    """Writes the parts of one store; many workers may hold one each, for the same `uri` and `spec`.

    row_group_rows: rows that a reader of a few rows has to fetch; see `EmbeddingStore.read_rows`.
    Raises CirError if the folder is already for another identity: the message says which fields differ.
    """

    def __init__(self, uri: str, spec: StoreSpec, *, row_group_rows: int = ROW_GROUP_ROWS) -> None:
        self.uri, self.spec, self.row_group_rows = uri, spec, row_group_rows
        manifest_uri = self._file("manifest.json")
        self.committed = files.exists(manifest_uri)
        if self.committed:
            self._check_spec(Manifest.from_json(files.read_json(manifest_uri), files.redact(manifest_uri)).spec)
        else:
            spec_uri = self._file("_progress", "spec.json")
            self._check_spec(_parsed_spec(files.create_json(spec_uri, asdict(spec)), files.redact(spec_uri)))

    def _check_spec(self, found: StoreSpec) -> None:
        if found != self.spec:
            raise CirError(
                f"{files.redact(self.uri)} holds embeddings of another identity "
                f"({self.spec.differences(found)}); choose another output folder, or the settings that it was begun with"
            )

    @contextmanager
    def part(
        self, index: int, *, columns: Sequence[str] = (), caption_embeddings: bool = False
    ) -> Iterator[PartWriter]:
        """Write part `index` batch by batch; it is there, and marked as finished, once the block ends.

        The same rows give the same bytes, whatever the batches. Nothing is written if the block raises.
        columns: the names of further columns of strings; every part of a store has the same ones.
        Raises CirError if the store was committed, also by another process.
        """
        self._check_not_committed()
        name = part_name(index)
        schema = part_schema(self.spec, columns, caption_embeddings=caption_embeddings)
        with files.open_atomic(self._file(f"{name}.parquet")) as file:
            sink = HashingSink(file)
            with pq.ParquetWriter(sink, schema, **parquet_options(schema)) as parquet:
                part = PartWriter(name, self.spec, schema, parquet, row_group_rows=self.row_group_rows)
                yield part
                part.end()
            self._check_not_committed()  # by another driver, while this one embedded
        rejects_sha256 = self._write_rejects(
            name, part.rejects
        )  # after the part: a kill between them undoes the marker
        part.info = PartInfo(
            index, name, part.num_rows, len(part.rejects), sink.sha256, rejects_sha256, sink.size_bytes,
            tuple(schema.names[2:]),
        )  # fmt: skip
        marker = {"identity": self.spec.identity, **asdict(part.info)}
        files.write_json(self._file("_progress", f"{name}.json"), marker)

    def _check_not_committed(self) -> None:
        self.committed = self.committed or files.exists(self._file("manifest.json"))
        if self.committed:
            raise CirError(f"{files.redact(self.uri)} is committed; its parts do not change any more")

    def _write_rejects(self, name: str, rejects: Sequence[Reject]) -> str:
        table = pa.Table.from_pylist([asdict(reject) for reject in rejects], REJECT_SCHEMA)
        with files.open_atomic(self._file("rejects", f"{name}.parquet")) as file:
            sink = HashingSink(file)
            pq.write_table(table, sink)
        return sink.sha256

    def write_part(
        self,
        index: int,
        ids: Sequence[str],
        embeddings: npt.NDArray[np.float32],
        *,
        columns: Mapping[str, Sequence[str | None]] | None = None,
        caption_embeddings: npt.NDArray[np.float32] | None = None,
        rejects: Sequence[Reject] = (),
    ) -> PartInfo:
        """Write a whole part at once; see `part` and `PartWriter.add`."""
        texts = caption_embeddings is not None
        with self.part(index, columns=tuple(columns or {}), caption_embeddings=texts) as part:
            part.add(ids, embeddings, columns=columns, caption_embeddings=caption_embeddings)
            part.reject(rejects)
        return self._info(part)

    @staticmethod
    def _info(part: PartWriter) -> PartInfo:
        if part.info is None:
            raise RuntimeError(f"{part.name} is not finished")
        return part.info

    def _file(self, *parts: str) -> str:
        return files.join(self.uri, *parts)

    def finished_part(self, index: int) -> PartInfo | None:
        """Return what was written as part `index`; None if it is not finished."""
        marker = self._file("_progress", f"{part_name(index)}.json")
        part = self._file(f"{part_name(index)}.parquet")
        if not (files.exists(marker) and files.exists(part)):
            return None
        info = self._read_marker(marker)
        return info if files.size_bytes(part) == info.size_bytes else None

    def finished_parts(self) -> dict[int, PartInfo]:
        """Return the parts that are written and marked, by index; costs two listings and the markers.

        A marker whose part is gone or has another size does not count: that part is to be written again.
        Raises CirError for a marker of another identity.
        """
        if not files.exists(self._file("_progress")):
            return {}
        markers = [file.uri for file in files.list_files(self._file("_progress")) if file.name.startswith("part-")]
        sizes = {file.name: file.size_bytes for file in files.list_files(self.uri, recursive=False)}
        sound = []
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(markers), _MARKERS):  # what waits in a pool takes more memory than what is read
                found = pool.map(self._read_marker, markers[start : start + _MARKERS])
                sound += [part for part in found if sizes.get(f"{part.name}.parquet") == part.size_bytes]
        return {part.index: part for part in sorted(sound, key=lambda part: part.index)}

    def _read_marker(self, uri: str) -> PartInfo:
        value = files.read_json(uri)
        try:
            identity, part = value["identity"], part_info(value)
        except (KeyError, TypeError) as error:
            raise CirError(f"{files.redact(uri)}: not the marker of a part ({error}); remove it") from None
        if identity != self.spec.identity:
            raise CirError(f"{files.redact(uri)}: a part of another identity; choose another output folder")
        return part

    def duplicates(self, parts: Iterable[PartInfo]) -> dict[int, list[tuple[str, int]]]:
        """Return, by part, the (id, part that keeps it) that occur in an earlier one of `parts`."""
        return find_duplicates(self.uncommitted(list(parts)))

    def uncommitted(self, parts: list[PartInfo]) -> EmbeddingStore:
        """Return some finished parts as if they were a store."""
        num_rows, num_rejects = sum(part.num_rows for part in parts), sum(part.num_rejects for part in parts)
        columns = parts[0].columns if parts else ()
        return EmbeddingStore(self.uri, Manifest(self.spec, num_rows, num_rejects, columns, tuple(parts)))

    def drop_duplicates(
        self, parts: Mapping[int, PartInfo], shards: Mapping[int, str] | None = None
    ) -> dict[int, PartInfo]:
        """Keep the first row of each id: write the parts that hold a later one again, with that row as a reject.

        shards: what parts were made of, by index; a reject names it, or else the part. Returns all parts as they are
        now; killed half-way, the same again goes on.
        """
        found, names = self.duplicates(parts.values()), shards or {}
        return {**parts, **{one: self.without(parts[one], rows, names.get(one)) for one, rows in found.items()}}

    def without(self, part: PartInfo, rows: Sequence[tuple[str, int]], shard: str | None = None) -> PartInfo:
        """Write a part again with some (id, part that keeps it) as rejects; return what it is now. Twice is as once.

        shard: as in `drop_duplicates`. Raises CirError if the part was written again otherwise, only half of it was, or
        it does not hold these ids.
        """
        now = self.finished_part(part.index)
        left = (part.num_rows - len(rows), part.num_rejects + len(rows))
        if now is not None and (now.num_rows, now.num_rejects) == left:
            return now
        if now != part:
            raise CirError(f"{files.redact(self.uri)}: {part.name} was changed meanwhile; run the job again")
        (before,) = self.uncommitted([part]).read_rejects()
        with self.part(
            part.index,
            columns=[name for name in part.columns if name != "caption_embedding"],
            caption_embeddings="caption_embedding" in part.columns,
        ) as again:
            for batch in self.uncommitted([part]).iter_batches():
                again.copy(batch, leave_out=dict(rows).keys())
            again.reject(before)
            again.reject(
                Reject(shard or part.name, one, "duplicate_id", f"{part_name(place)} has it") for one, place in rows
            )
            if (again.num_rows, len(again.rejects)) != left:
                raise CirError(
                    f"{files.redact(self.uri)}: {part.name} does not hold the ids to drop; run the job again"
                )
        return self._info(again)

    def commit(
        self, *, rows_in: int, parts: Iterable[PartInfo] | None = None, check_unique_ids: bool = True
    ) -> Manifest:
        """Check the parts against each other and the input, then write manifest.json; return its content.

        rows_in: number of input rows; must equal rows out + rejects.
        parts: what write_part returned (default: every finished part); they are numbered 0, 1, 2, ...
        check_unique_ids: read all ids again and refuse one that occurs twice; 8 bytes of memory per row.
        Committing twice is allowed and gives the first manifest again; of two that commit at once, one wins.
        Raises CirError if anything is missing; nothing is committed then.
        """
        finished = self.finished_parts()
        wanted = sorted(finished.values() if parts is None else parts, key=lambda part: part.index)
        _check_parts(files.redact(self.uri), wanted, finished, rows_in)
        store = self.uncommitted(wanted)
        if check_unique_ids and not self.committed:
            for index, rows in find_duplicates(store).items():
                raise CirError(
                    f"{files.redact(self.uri)}: the id {rows[0][0]!r} occurs in {part_name(rows[0][1])} and in "
                    f"{part_name(index)}; ids must be unique"
                )
        manifest_uri = self._file("manifest.json")
        stored = files.create_json(manifest_uri, store.manifest.to_json())
        self.committed = True
        if Manifest.from_json(stored, files.redact(manifest_uri)) != store.manifest:
            raise CirError(f"{files.redact(self.uri)} is committed with other parts; choose another output folder")
        return store.manifest


def _parsed_spec(value: Any, name: str) -> StoreSpec:
    if isinstance(value, dict) and "precision" not in value:
        raise CirError(f"{name}: begun by older code, which does not say its precision; choose another output folder")
    try:
        return StoreSpec(**value)
    except TypeError as error:
        raise CirError(f"{name}: not the spec of an embedding store ({error})") from None


def _check_parts(name: str, parts: list[PartInfo], finished: Mapping[int, PartInfo], rows_in: int) -> None:
    indices = [part.index for part in parts]
    absent = sorted(set(range(max(indices, default=-1) + 1)) - set(indices))
    absent += [part.index for part in parts if finished.get(part.index) != part]
    if absent or len(set(indices)) != len(indices):
        raise CirError(f"{name}: parts {absent[:10]} are missing, given twice or not as reported; run the job again")
    rows_out, num_rejects = sum(part.num_rows for part in parts), sum(part.num_rejects for part in parts)
    if rows_in != rows_out + num_rejects:
        raise CirError(
            f"{name}: {rows_in} rows in, but {rows_out} rows out + {num_rejects} rejects "
            f"= {rows_out + num_rejects}; nothing is committed"
        )
    odd = next((part for part in parts if part.columns != parts[0].columns), None)
    if odd is not None:
        raise CirError(f"{name}: {odd.name} has the columns {odd.columns}, {parts[0].name} has {parts[0].columns}")
