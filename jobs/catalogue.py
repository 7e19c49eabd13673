"""Answering a catalogue's queries part by part on Ray: the tasks and the actor; the driver sees only counts.

A part is a slice of a queries file. It is read, its references are looked up in the store, its captions and the pictures
that lie outside are encoded, every share of the gallery is searched and asked for the ids of the images that are in the
lists, and one task writes these and then the part's marker:

    results/<method>/part-00000.parquet   result lists of every alpha
    per_query/part-00000.parquet          ranks of the targets, where the queries have some
    rejects/part-00000.parquet            queries whose reference picture cannot be used
    sample/part-00000.safetensors         of approximate search, the queries that exact search answers too
    _progress/part-00000.json             counts and scores; a part with one is finished
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch

from cir_core import files
from cir_core.benchmarks import QuerySlice
from cir_core.benchmarks.custom import is_picture
from cir_core.encoders import load_encoder
from cir_core.evaluation import save_ranking, score_part
from cir_core.schema import REJECT_SCHEMA, CirError, Query, Ranking, Reject
from cir_core.search import TopK
from jobs.catalogue_approximate import ApproximateSearch
from jobs.catalogue_lookup import Found, StoreIds, read_part
from jobs.catalogue_recall import sample_uri, save_sample
from jobs.decoding import Picture, decoded_ahead
from jobs.gallery_search import GallerySearch, Setting, Tile

_RANKS = ("rank", "pessimistic_rank")
Rows = npt.NDArray[np.int64]
_FETCHES = 4  # picture tasks in flight per encoder
_CHUNK = 64  # pictures of one such task: some seconds of decoding


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """What `load_encoder` is told, and the size of an image batch."""

    model: str
    pretrained: str | None
    adapter: str | None
    precision: str
    preprocessing_mode: str
    decode: str
    use_gpu: bool
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class CatalogueRun:
    """What every part needs to know. metrics: of queries with targets, else (). made: what each ranking says of itself."""

    store: str
    folder: str
    settings: tuple[Setting, ...]
    k: int
    metrics: tuple[str, ...]
    gallery_size: int
    reference_removed: bool
    allow_rejects: bool
    made: dict[str, object]


@dataclass(frozen=True)
class Prepared:
    """A part between its encoding and its writing. kept: [Q] whether a query is answered; rejects: why the others are not."""

    queries: tuple[Query, ...]
    kept: list[bool]
    rejects: list[Reject]
    ranked_sizes: list[int]
    num_truncated: int


class QueryEncoder:
    """An actor that encodes the captions and outside pictures of parts; the model is loaded once, at the first call."""

    def __init__(self, choice: EncoderChoice) -> None:
        self.choice = choice
        self._loaded: Any = None

    @property
    def encoder(self) -> Any:
        """The loaded model."""
        if self._loaded is None:
            one = self.choice
            device = "cuda" if one.use_gpu else "cpu"
            self._loaded = load_encoder(
                one.model,
                one.pretrained,
                one.adapter,
                device,
                one.precision,
                preprocessing_mode=one.preprocessing_mode,
                decode=one.decode,
            )
        return self._loaded

    def encode(self, run: CatalogueRun, where: str, queries: tuple[Query, ...], *found: Any) -> tuple[Tile, Prepared]:
        """Make the tile of a part. where: its file, for rejects. A rejected query keeps its place, with its text as image.

        found: what `StoreIds.look_up` returned.

        Raises:
            CirError: an id that is neither in the store nor a picture; a picture that cannot be used, if none may be.
        """
        held, members = _rows_by_id(found[0::3]), _rows_by_id(found[1::3])
        vectors = dict(zip(held, torch.from_numpy(np.concatenate(found[2::3]).astype(np.float32)), strict=True))
        _check_found(queries, held.keys(), members.keys())
        captions = [query.relative_caption for query in queries]
        texts = self.encoder.encode_texts(captions).cpu()
        outside = [query.reference_id for query in queries if query.reference_id not in held]
        pictures, faults = self._encode_pictures(list(dict.fromkeys(outside)))
        rejects = [
            Reject(where, query.query_id, *faults[query.reference_id])
            for query in queries
            if query.reference_id in faults
        ]
        if rejects and not run.allow_rejects:
            first = rejects[0]
            raise CirError(
                f"{where}: {len(rejects)} reference pictures of a part cannot be used, first that of query {first.key!r}: "
                f"{first.reason}, {first.detail}. Repair them, or allow some with --max_rejects"
            )
        images = texts.clone()
        for place, query in enumerate(queries):
            vector = vectors.get(query.reference_id, pictures.get(query.reference_id))
            if vector is not None:
                images[place] = vector
        exclude = [held.get(query.reference_id, -1) if run.reference_removed else -1 for query in queries]
        subsets = None
        sizes = [run.gallery_size - (row >= 0) for row in exclude]
        if any(query.subset_ids for query in queries):
            pairs = zip(queries, exclude, strict=True)
            subsets = [[members[one] for one in query.subset_ids if members[one] != out] for query, out in pairs]
            sizes = list(map(len, subsets))
        kept = [query.reference_id not in faults for query in queries]
        prepared = Prepared(queries, kept, rejects, sizes, self.encoder.count_truncated(captions))
        return Tile(images, texts, exclude, subsets), prepared

    def _encode_pictures(self, uris: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, tuple[str, str]]]:
        """Fetch, decode and encode pictures, a bounded number at a time; return embeddings, and reasons and details."""
        chunks = [[Picture(uri, uri) for uri in uris[start : start + _CHUNK]] for start in range(0, len(uris), _CHUNK)]
        vectors: dict[str, torch.Tensor] = {}
        faults: dict[str, tuple[str, str]] = {}
        for pictures, decoded in decoded_ahead(chunks, self.encoder.preprocessing, _FETCHES):
            faults |= {one.key: (one.reason, f"{one.shard}: {one.detail}") for one in decoded.rejects}
            usable = [picture.key for picture in itertools.compress(pictures, decoded.readable)]
            for start in range(0, len(usable), self.choice.batch_size):
                batch = slice(start, start + self.choice.batch_size)
                pixels = torch.from_numpy(decoded.images[batch].copy())
                vectors |= dict(zip(usable[batch], self.encoder.encode_images(pixels).cpu(), strict=True))
        return vectors, faults


def _rows_by_id(shares: Sequence[Found]) -> dict[str, int]:
    return {name: int(row) for share in shares for name, row in zip(share.names, share.rows, strict=True)}


def _check_found(queries: Sequence[Query], held: Any, members: Any) -> None:
    """Raise CirError for what the check before work can have missed: the store was replaced, or two hashes agreed."""
    for query in queries:
        missing = [one for one in query.subset_ids if one not in members]
        if query.reference_id not in held and not is_picture(query.reference_id):
            missing.insert(0, query.reference_id)
        if missing:
            raise CirError(f"query {query.query_id!r}: the store does not hold {missing[0]!r}")


@ray.remote(num_cpus=0.5, max_retries=5)
def rows_in(prepared: Prepared, answers: dict[Setting, TopK]) -> Rows:
    """Return the gallery indices that the lists of the answered queries hold, each once, rising."""
    kept = np.flatnonzero(prepared.kept)
    found = np.unique(np.concatenate([answer.indices.numpy()[kept].reshape(-1) for answer in answers.values()]))
    return found[found >= 0]


@ray.remote(num_cpus=1, max_retries=5)
def write_part(
    run: CatalogueRun,
    number: int,
    prepared: Prepared,
    answers: dict[Setting, TopK],
    num_sampled: int,
    listed: Rows,
    *names: pa.Array,
) -> dict[str, Any]:
    """Write all files of a part, its marker last; return the marker's content.

    num_sampled: queries in its sample, kept. listed: what `rows_in` returned; names: their ids, share after share.
    """
    rows = np.flatnonzero(prepared.kept)
    ids = pa.chunked_array(names, pa.large_string()).to_numpy()
    if len(ids) != len(listed):
        raise RuntimeError(f"{len(ids)} ids for {len(listed)} images of part {number}: the store was changed meanwhile")
    queries = [prepared.queries[row] for row in rows]
    sizes = np.array(prepared.ranked_sizes)[rows]
    rankings = _rankings(run, queries, rows, answers, listed, ids)
    name = f"part-{number:05d}"
    written: dict[str, int] = {}
    scores: dict[str, Any] = {}
    tables = []
    for method in dict.fromkeys(method for method, _ in run.settings):
        uri = files.join(run.folder, "results", method, f"{name}.parquet")
        save_ranking({alpha: found for (one, alpha), found in rankings.items() if one == method}, uri)
        written[method] = files.size_bytes(uri)
    for (method, alpha), ranking in rankings.items() if run.metrics and queries else ():
        table, scores[label(method, alpha)] = score_part(ranking, queries, run.metrics, sizes)
        made = {"method": pa.array([method] * len(queries)), "alpha": pa.array([alpha] * len(queries), pa.float64())}
        tables.append(pa.table({"query_id": table.column("query_id"), **made, **{c: table.column(c) for c in _RANKS}}))
    if tables:
        files.write_parquet(files.join(run.folder, "per_query", f"{name}.parquet"), pa.concat_tables(tables))
    rejects = pa.Table.from_pylist([asdict(reject) for reject in prepared.rejects], REJECT_SCHEMA)
    files.write_parquet(files.join(run.folder, "rejects", f"{name}.parquet"), rejects)
    marker = {
        "part": number,
        "num_queries": len(prepared.queries),
        "num_answered": len(queries),
        "num_rejects": len(prepared.rejects),
        "num_truncated": prepared.num_truncated,
        "num_sampled": num_sampled,
        "size_bytes": written,
        "scores": scores,
    }
    files.write_json(files.join(run.folder, "_progress", f"{name}.json"), marker)
    return marker


def label(method: str, alpha: float | None) -> str:
    """Return a setting's name, as in 'slerp@0.8'."""
    return method if alpha is None else f"{method}@{alpha}"


def _rankings(
    run: CatalogueRun,
    queries: list[Query],
    rows: Rows,
    answers: dict[Setting, TopK],
    listed: Rows,
    listed_ids: npt.NDArray[np.object_],
) -> dict[Setting, Ranking]:
    """Turn gallery indices into ids."""
    indices = np.stack([answers[key].indices.numpy()[rows] for key in run.settings])
    names = np.full(indices.shape, "", dtype=object)
    names[indices >= 0] = listed_ids[np.searchsorted(listed, indices[indices >= 0])]
    ids = tuple(query.query_id for query in queries)
    return {
        key: Ranking(
            ids,
            names[place].astype(np.str_),
            answers[key].scores.numpy()[rows],
            {"method": key[0], "alpha": key[1], **run.made},
        )
        for place, key in enumerate(run.settings)
    }


class PartPipeline:
    """Starts parts: everything between a slice and its marker is a chain of tasks; nothing comes to the driver."""

    def __init__(
        self,
        run: CatalogueRun,
        search: GallerySearch | ApproximateSearch,
        ids: StoreIds,
        encoders: Sequence[Any],
        sample_sizes: Mapping[int, int],
        seed: int,
    ) -> None:
        self.run, self.search, self.ids, self.encoders = run, search, ids, encoders
        self.sample_sizes, self.seed = sample_sizes, seed
        self.run_ref = ray.put(run)

    def start(self, number: int, part: QuerySlice) -> Any:
        """Start a part; return a reference to what its marker holds."""
        queries = read_part.remote(part)
        found = self.ids.look_up(queries)
        encoder = self.encoders[number % len(self.encoders)]
        where = files.redact(part.uri)
        tile, prepared = encoder.encode.options(num_returns=2).remote(self.run_ref, where, queries, *found)
        answers = self.search.start(tile, list(self.run.settings), self.run.k)
        num_sampled: Any = 0
        if size := self.sample_sizes.get(number, 0):
            uri = sample_uri(self.run.folder, number)
            num_sampled = save_sample.remote(uri, size, [self.seed, number], tile, prepared, answers)
        listed = rows_in.remote(prepared, answers)
        return write_part.remote(
            self.run_ref, number, prepared, answers, num_sampled, listed, *self.ids.names_of(listed)
        )
