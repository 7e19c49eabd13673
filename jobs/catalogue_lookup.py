"""Reading a catalogue's parts and finding their images in the store. Apart, for processes that start without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from cir_core.benchmarks import QuerySlice, read_query_slice
from cir_core.embedding_store import EmbeddingStore
from cir_core.schema import Query


@dataclass(frozen=True)
class Found:
    """Ids that a share of the store holds, their rows [n], and their embeddings [n, D], where those are wanted."""

    names: list[str]
    rows: np.ndarray[Any, Any]
    embeddings: np.ndarray[Any, Any]


@ray.remote(num_cpus=1, max_retries=5)
def read_part(part: QuerySlice) -> tuple[Query, ...]:
    """Read the queries of a part."""
    return read_query_slice(part)


@ray.remote(num_cpus=1, max_retries=5)
def look_up(store: str, parts: list[int], queries: tuple[Query, ...]) -> tuple[Found, Found]:
    """Find the queries' references, with embeddings, and the members of their subsets in some parts of the store."""
    opened = EmbeddingStore.open(store)
    references = Found(*opened.find([query.reference_id for query in queries], parts))
    members = [name for query in queries for name in query.subset_ids]
    nothing = np.empty(0, np.int64)
    found = Found(*opened.find(members, parts, embeddings=False)) if members else Found([], nothing, nothing)
    return references, found
