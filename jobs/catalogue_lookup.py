"""Reading a catalogue's parts, and the ids of its store both ways. Apart, for processes that start without torch.

Every part asks which rows its references have and, once it is searched, which ids its lists have: at a billion images, 20 GB
of ids in 100,000 files. So each share of the store has an actor that reads its ids once and holds them; for few parts or a
small store tasks read them. Likewise its references' embeddings: a row group in storage each, or a row of a share that the
search holds in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from cir_core.benchmarks import QuerySlice, read_query_slice
from cir_core.embedding_store import Embeddings, EmbeddingStore, IdIndex
from cir_core.schema import Query

_ACTOR_ROWS = 100_000  # below, reading takes less than an actor's start


@dataclass(frozen=True)
class Found:
    """Ids that a share of the store holds, and their rows [n]."""

    names: list[str]
    rows: npt.NDArray[np.int64]


class ShareIds:
    """The ids of some parts of a store, read when first asked for."""

    def __init__(self, store: str, parts: list[int]) -> None:
        self.store, self.parts = EmbeddingStore.open(store), parts

    def look_up(self, queries: tuple[Query, ...]) -> tuple[Found, Found, npt.NDArray[np.int64]]:
        """Find the queries' references and the members of their subsets in these parts; the references' rows once more."""
        references = Found(*self._index.rows_of([query.reference_id for query in queries]))
        members = Found(*self._index.rows_of([name for query in queries for name in query.subset_ids]))
        return references, members, references.rows

    def embeddings_at(self, rows: npt.NDArray[np.int64]) -> Embeddings:
        """Return the embeddings [n, D] of rows [n]."""
        return self.store.embeddings_at(rows)

    def names_of(self, rows: npt.NDArray[np.int64]) -> pa.Array:
        """Return the ids of those of the rows, rising, that are in these parts."""
        return self._index.ids_of(rows)[1]

    @cached_property
    def _index(self) -> IdIndex:
        return IdIndex(self.store, self.parts)


_Actor = ray.remote(num_cpus=0.01, max_restarts=-1, max_task_retries=5, scheduling_strategy="SPREAD")(ShareIds)


@ray.remote(num_cpus=1, num_returns=3, max_retries=5)
def _look_up(store: str, parts: list[int], queries: tuple[Query, ...]) -> tuple[Found, Found, npt.NDArray[np.int64]]:
    return ShareIds(store, parts).look_up(queries)


@ray.remote(num_cpus=1, max_retries=5)
def _embeddings_at(store: str, rows: npt.NDArray[np.int64]) -> Embeddings:
    return EmbeddingStore.open(store).embeddings_at(rows)


@ray.remote(num_cpus=1, max_retries=5)
def _names_of(store: str, parts: list[int], rows: npt.NDArray[np.int64]) -> pa.Array:
    needed = set(EmbeddingStore.open(store).parts_of(rows)) & set(parts)
    return ShareIds(store, sorted(needed)).names_of(rows)


@ray.remote(num_cpus=1, max_retries=5)
def read_part(part: QuerySlice) -> tuple[Query, ...]:
    """Read the queries of a part."""
    return read_query_slice(part)


class StoreIds:
    """Rows by id and ids by row of a whole store, asked share by share; arguments and results are references.

    shares: the parts of each share. num_tiles: how often will be asked; actors are worth their start for several times.
    holders: actors that hold the embeddings of these shares, share by share, where there are some.
    """

    def __init__(self, store: str, shares: Sequence[list[int]], *, num_tiles: int, holders: Sequence[Any] = ()) -> None:
        self.store, self.shares, self.holders = store, shares, holders
        self.actors: list[Any] = []
        if num_tiles > 1 and EmbeddingStore.open(store).num_rows >= _ACTOR_ROWS:
            self.actors = [_Actor.remote(store, share) for share in shares]

    def look_up(self, queries: Any) -> list[Any]:
        """Return three references for each share: what it holds of the queries' references, as `Found`; of the members of
        their subsets; and its references' embeddings."""
        if self.actors:
            found = [actor.look_up.options(num_returns=3).remote(queries) for actor in self.actors]
        else:
            found = [_look_up.remote(self.store, share, queries) for share in self.shares]
        holders = self.holders or self.actors
        if holders:
            vectors = [one.embeddings_at.remote(rows) for one, (_, _, rows) in zip(holders, found, strict=True)]
        else:
            vectors = [_embeddings_at.remote(self.store, rows) for _, _, rows in found]
        return [ref for one, held in zip(found, vectors, strict=True) for ref in (*one[:2], held)]

    def names_of(self, rows: Any) -> list[Any]:
        """Return a reference for each share: the ids of those of the rows that it holds. One after the other: of all rows."""
        if self.actors:
            return [actor.names_of.remote(rows) for actor in self.actors]
        return [_names_of.remote(self.store, share, rows) for share in self.shares]

    def close(self) -> None:
        """End the actors: their memory is free at once, also after an error."""
        for actor in self.actors:
            ray.kill(actor)
