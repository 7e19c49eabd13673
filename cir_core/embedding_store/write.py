"""Write the parts of a store and commit them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from cir_core import files
from cir_core.embedding_store.manifest import Manifest, PartInfo, StoreSpec, part_info, part_name
from cir_core.embedding_store.read import EmbeddingStore
from cir_core.schema import REJECT_SCHEMA, CirError, Reject, embedding_schema

_NORM_TOLERANCE = 1e-3  # float32 rounding is 1e-6; a vector that was never normalised is off by far more
_ROW_GROUP_ROWS = 16_384  # 32 MiB of float32[512]: what take() reads for one id
_READERS = 16  # requests in flight while many small files are read


class EmbeddingWriter:
    """Writes the parts of one store; many workers may hold one each, for the same `uri` and `spec`.

    row_group_rows: rows that a reader of a few rows has to fetch; see `EmbeddingStore.read_rows`.
    Raises CirError if the folder is already for another identity: the message says which fields differ.
    """

    def __init__(self, uri: str, spec: StoreSpec, *, row_group_rows: int | None = None) -> None:
        self.uri, self.spec, self.row_group_rows = uri, spec, row_group_rows or _ROW_GROUP_ROWS
        spec_uri = files.join(uri, "_progress", "spec.json")
        manifest_uri = files.join(uri, "manifest.json")
        self.committed = files.exists(manifest_uri)
        if self.committed:
            self._check_spec(Manifest.from_json(files.read_json(manifest_uri), files.redact(manifest_uri)).spec)
        elif files.exists(spec_uri):
            self._check_spec(_read_spec(spec_uri))
        else:
            files.write_json(spec_uri, asdict(spec))

    def _check_spec(self, found: StoreSpec) -> None:
        if found != self.spec:
            raise CirError(
                f"{files.redact(self.uri)} holds embeddings of another identity "
                f"({self.spec.differences(found)}); choose another output folder"
            )

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
        """Write part `index` and mark it finished; the same arguments give the same bytes.

        ids: N strings, unique in the part. embeddings, caption_embeddings: float32[N, D], unit norm.
        columns: more columns of N strings; every part of a store has the same ones.
        Raises CirError on any violation.
        """
        if self.committed:
            raise CirError(f"{files.redact(self.uri)} is committed; its parts do not change any more")
        name = part_name(index)
        vectors = {"embedding": embeddings}
        if caption_embeddings is not None:
            vectors["caption_embedding"] = caption_embeddings
        table = self._table(name, list(ids), vectors, dict(columns or {}))
        data = files.parquet_bytes(table, row_group_size=self.row_group_rows, **_parquet_options(table.schema))
        info = PartInfo(
            index, name, table.num_rows, len(rejects), hashlib.sha256(data).hexdigest(), data.size,
            tuple(table.schema.names[2:]),
        )  # fmt: skip
        rows = [asdict(reject) for reject in rejects]
        files.write_parquet(self._file("rejects", f"{name}.parquet"), pa.Table.from_pylist(rows, REJECT_SCHEMA))
        files.write_bytes(self._file(f"{name}.parquet"), data)
        files.write_json(self._file("_progress", f"{name}.json"), {"identity": self.spec.identity, **asdict(info)})
        return info

    def _file(self, *parts: str) -> str:
        return files.join(self.uri, *parts)

    def _table(
        self,
        name: str,
        ids: list[str],
        vectors: Mapping[str, npt.NDArray[np.float32]],
        columns: Mapping[str, Sequence[str | None]],
    ) -> pa.Table:
        _check_ids(name, ids)
        schema = embedding_schema(self.spec.dim, self.spec.dtype, list(columns))
        arrays: dict[str, pa.Array] = {"id": pa.array(ids, pa.string())}
        for column, values in vectors.items():
            _check_vectors(f"{name}: {column}", values, len(ids), self.spec.dim)
            flat = np.ascontiguousarray(values, dtype=self.spec.dtype).reshape(-1)
            arrays[column] = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=schema.field("embedding").type)
        if "caption_embedding" in vectors:
            schema = schema.insert(2, pa.field("caption_embedding", schema.field("embedding").type))
        for column, texts in columns.items():
            if column in ("id", "embedding", "caption_embedding") or len(texts) != len(ids):
                raise CirError(f"{name}: column {column!r} has {len(texts)} values for {len(ids)} ids, or a taken name")
            arrays[column] = pa.array(texts, pa.string())
        return pa.Table.from_arrays([arrays[column] for column in schema.names], schema=schema)

    def finished_parts(self) -> dict[int, PartInfo]:
        """Return the parts that are written and marked, by index; costs two listings and the markers.

        A marker whose part is gone or has another size does not count: that part is to be written again.
        Raises CirError for a marker of another identity.
        """
        if not files.exists(self._file("_progress")):
            return {}
        markers = [file.uri for file in files.list_files(self._file("_progress")) if file.name.startswith("part-")]
        sizes = {file.name: file.size_bytes for file in files.list_files(self.uri, recursive=False)}
        with ThreadPoolExecutor(_READERS) as pool:
            values = list(pool.map(files.read_json, markers))
        strangers = [uri for uri, value in zip(markers, values, strict=True) if value["identity"] != self.spec.identity]
        if strangers:
            raise CirError(f"{files.redact(strangers[0])}: a part of another identity; choose another output folder")
        found = sorted((part_info(value) for value in values), key=lambda part: part.index)
        return {part.index: part for part in found if sizes.get(f"{part.name}.parquet") == part.size_bytes}

    def commit(
        self, *, rows_in: int, parts: Iterable[PartInfo] | None = None, check_unique_ids: bool = True
    ) -> Manifest:
        """Check the parts against each other and the input, then write manifest.json; return its content.

        rows_in: number of input rows; must equal rows out + rejects.
        parts: what write_part returned (default: every finished part); they are numbered 0, 1, 2, ...
        check_unique_ids: read all ids again and refuse one that occurs twice; 8 bytes of memory per row.
        Committing twice is allowed and gives the first manifest again.
        Raises CirError if anything is missing; nothing is committed then.
        """
        finished = self.finished_parts()
        wanted = sorted(finished.values() if parts is None else parts, key=lambda part: part.index)
        _check_parts(files.redact(self.uri), wanted, finished, rows_in)
        columns = wanted[0].columns if wanted else ()
        num_rows, num_rejects = sum(p.num_rows for p in wanted), sum(p.num_rejects for p in wanted)
        manifest = Manifest(self.spec, num_rows, num_rejects, columns, tuple(wanted))
        if self.committed:
            committed = EmbeddingStore.open(self.uri).manifest
            if committed != manifest:
                raise CirError(f"{files.redact(self.uri)} is committed with other parts; choose another output folder")
            return committed
        if check_unique_ids:
            _check_unique(EmbeddingStore(self.uri, manifest))
        files.write_json(self._file("manifest.json"), manifest.to_json())
        self.committed = True
        return manifest


def _read_spec(uri: str) -> StoreSpec:
    try:
        return StoreSpec(**files.read_json(uri))
    except TypeError as error:
        raise CirError(f"{files.redact(uri)}: not the spec of an embedding store ({error})") from None


def _parquet_options(schema: pa.Schema) -> dict[str, Any]:
    vectors = {name for name in schema.names if pa.types.is_fixed_size_list(schema.field(name).type)}
    # float vectors do not compress, and statistics of single numbers or of ids help nobody
    paths = {f"{name}.list.element" if name in vectors else name: name for name in schema.names}
    compression = {path: "none" if name in vectors else "zstd" for path, name in paths.items()}
    return {
        "compression": compression, "use_dictionary": False, "write_statistics": False,
    }  # fmt: skip


def _check_ids(name: str, ids: list[str]) -> None:
    if not all(isinstance(one, str) and one for one in ids):
        raise CirError(f"{name}: every id must be a string that is not empty")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(one for one in ids if one in seen or seen.add(one))  # type: ignore[func-returns-value]
        raise CirError(f"{name}: the id {twice!r} occurs twice")


def _check_vectors(name: str, vectors: npt.NDArray[Any], num_rows: int, dim: int) -> None:
    if vectors.dtype != np.float32 or vectors.shape != (num_rows, dim):
        raise CirError(f"{name}: expected float32[{num_rows}, {dim}], found {vectors.dtype}{list(vectors.shape)}")
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    bad = np.flatnonzero(~(np.abs(norms - 1) <= _NORM_TOLERANCE))
    if bad.size:
        raise CirError(
            f"{name}: {bad.size} of {num_rows} rows are not finite unit vectors; row {bad[0]} has norm {norms[bad[0]]}"
        )


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


def _check_unique(store: EmbeddingStore) -> None:
    hashes = [hash_ids(ids) for _, ids in store.iter_ids()]
    everything = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
    suspects = np.unique(everything[1:][everything[1:] == everything[:-1]])
    if not suspects.size:
        return
    seen: set[str] = set()  # equal hashes may be a coincidence: compare these few ids themselves
    for _, ids in store.iter_ids():
        for one in ids.filter(pa.array(np.isin(hash_ids(ids), suspects))).to_pylist():
            if one in seen:
                raise CirError(f"{files.redact(store.uri)}: the id {one!r} occurs in two parts; ids must be unique")
            seen.add(one)


def hash_ids(ids: pa.Array) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each id, the same in every process. Equal hashes may be a coincidence."""
    hashed: npt.NDArray[np.uint64] = pd.util.hash_array(ids.to_numpy(zero_copy_only=False), categorize=False)
    return hashed
