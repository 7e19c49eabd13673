"""Rankings on disk: one Parquet file of RANKING_SCHEMA holds the result lists of every alpha of a sweep.

One row a result: query_id, alpha (null for a composition without one), rank (from 1), image_id, score. Empty
places of a `Ranking` are not rows. Each ranking's protocol is JSON in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cir_core import files
from cir_core.schema import RANKING_SCHEMA, CirError, Ranking

_PROTOCOLS = b"cir.protocols"
_ROWS_PER_GROUP = 1 << 20


def save_ranking(rankings: Ranking | Mapping[float | None, Ranking], uri: str) -> None:
    """Write one ranking, or the rankings of a sweep by alpha, to a Parquet file, atomically.

    `load_ranking` gives back the same ids and scores, bit for bit, up to trailing places that no query fills.
    A single Ranking is stored under alpha null. Raises CirError for a query without results (a row is a
    result, so it would vanish), a query listed twice, and a protocol that is not JSON.
    """
    by_alpha: Mapping[float | None, Ranking] = {None: rankings} if isinstance(rankings, Ranking) else rankings
    if not by_alpha:
        raise CirError(f"{files.redact(uri)}: no rankings to save")
    schema = RANKING_SCHEMA.with_metadata({_PROTOCOLS: _protocols_json(by_alpha, uri)})
    with files.open_atomic(uri) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for alpha, ranking in by_alpha.items():
            table = _to_table(alpha, ranking, uri).replace_schema_metadata(schema.metadata)
            writer.write_table(table, row_group_size=_ROWS_PER_GROUP)


def load_ranking(uri: str) -> dict[float | None, Ranking]:
    """Read a file of rankings: {alpha: Ranking}, alphas and queries in file order, k = the longest list.

    Raises CirError for a file that is not Parquet of RANKING_SCHEMA, and for a query whose ranks are not 1,
    2, 3, ...
    """
    name = files.redact(uri)
    with files.open_random(uri) as file:
        try:
            parquet = pq.ParquetFile(file)
            table = parquet.read()
        except pa.ArrowInvalid as error:
            raise CirError(f"{name}: not a Parquet file ({error})") from None
    if table.schema.names != RANKING_SCHEMA.names or table.schema.types != RANKING_SCHEMA.types:
        raise CirError(f"{name}: not a ranking file; expected {RANKING_SCHEMA}, found {table.schema}")
    protocols = json.loads((table.schema.metadata or {}).get(_PROTOCOLS, b"{}"))
    result: dict[float | None, Ranking] = {}
    for alpha in pc.unique(table.column("alpha")).to_pylist():
        field = pc.field("alpha")
        part = table.filter(field.is_null() if alpha is None else field == alpha)
        result[alpha] = _from_table(part, protocols.get(_key(alpha), {}), f"{name}, alpha {alpha}")
    return result


def _key(alpha: float | None) -> str:
    return "null" if alpha is None else repr(float(alpha))


def _protocols_json(by_alpha: Mapping[float | None, Ranking], uri: str) -> bytes:
    protocols = {_key(alpha): ranking.protocol for alpha, ranking in by_alpha.items()}
    try:
        return json.dumps(protocols, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise CirError(f"{files.redact(uri)}: a ranking's protocol cannot be stored as JSON ({error})") from None


def _to_table(alpha: float | None, ranking: Ranking, uri: str) -> pa.Table:
    where = f"{files.redact(uri)}, alpha {alpha}"
    if alpha is not None and not np.isfinite(alpha):
        raise CirError(f"{where}: alpha must be a finite number or None")
    if len(set(ranking.query_ids)) != len(ranking.query_ids):
        raise CirError(f"{where}: a query is listed twice")
    filled = ranking.image_ids != ""
    lengths = filled.sum(axis=1)
    places = np.arange(1, filled.shape[1] + 1)
    if lengths.size and lengths.min() == 0:
        raise CirError(f"{where}: query {ranking.query_ids[int(lengths.argmin())]!r} has no results")
    if not np.array_equal(filled, places <= lengths[:, None]):
        raise CirError(f"{where}: an empty place before a result")
    owners = pa.array(np.repeat(np.arange(lengths.size, dtype=np.int32), lengths))
    columns = [
        pc.take(pa.array(ranking.query_ids, pa.string()), owners),
        pa.array(np.full(len(owners), alpha), pa.float64())
        if alpha is not None
        else pa.nulls(len(owners), pa.float64()),
        pa.array(np.broadcast_to(places, filled.shape)[filled], pa.int32()),
        pa.array(ranking.image_ids[filled], pa.string()),
        pa.array(ranking.scores[filled], pa.float32()),
    ]
    return pa.table(columns, schema=RANKING_SCHEMA)


def _from_table(table: pa.Table, protocol: dict[str, object], where: str) -> Ranking:
    if any(table.column(name).null_count for name in ("query_id", "rank", "image_id", "score")):
        raise CirError(f"{where}: a null where a value is needed")
    encoded = pc.dictionary_encode(table.column("query_id")).combine_chunks()
    query_ids = tuple(encoded.dictionary.to_pylist())
    rows: npt.NDArray[np.int64] = encoded.indices.to_numpy().astype(np.int64)
    ranks: npt.NDArray[np.int64] = table.column("rank").to_numpy().astype(np.int64)
    lengths = np.bincount(rows, minlength=len(query_ids))
    seen = np.zeros((len(query_ids), int(lengths.max(initial=0))), dtype=np.bool_)
    inside = (ranks >= 1) & (ranks <= lengths[rows])
    seen[rows[inside], ranks[inside] - 1] = True
    wrong = seen.sum(axis=1) != lengths  # a rank out of range or taken twice leaves a place empty
    if wrong.any():
        raise CirError(f"{where}: the ranks of query {query_ids[int(wrong.argmax())]!r} are not 1, 2, 3, ...")
    names = table.column("image_id").to_numpy().astype(np.str_)
    image_ids = np.full(seen.shape, "", dtype=names.dtype)
    scores = np.full(seen.shape, -np.inf, dtype=np.float32)
    image_ids[rows, ranks - 1] = names
    scores[rows, ranks - 1] = table.column("score").to_numpy()
    return Ranking(query_ids, image_ids, scores, protocol)
