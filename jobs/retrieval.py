"""Sharded composed retrieval on Ray: every task scans its share of a gallery once for all methods and alphas.

The result does not depend on the number of shards: scores are defined by query and image alone and ties go by gallery
index (cir_core.search), so merging the shards' lists gives what one search over everything gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from cir_core.benchmarks import Benchmark
from cir_core.composition import query_weights, takes_alpha
from cir_core.embedding_store import EmbeddingStore
from cir_core.schema import Ranking
from cir_core.search import TopK, merge_top_k, weighted_top_k

Setting = tuple[str, float | None]  # a method and its alpha, None where it has none
_FAN_IN = 8  # lists merged by one task


@dataclass(frozen=True)
class Tile:
    """A batch of queries that one scan answers. images, texts: float32[Q, D]; exclude: gallery index or -1, [Q]."""

    images: Tensor
    texts: Tensor
    exclude: list[int]


def settings_of(methods: Sequence[str], alphas: Sequence[float]) -> list[Setting]:
    """Return every method with every alpha it takes."""
    return [(name, alpha) for name in methods for alpha in (alphas if takes_alpha(name) else [None])]


@ray.remote(num_cpus=1, max_retries=5)
def _search_parts(uri: str, parts: list[int], tile: Tile, settings: list[Setting], k: int) -> dict[Setting, TopK]:
    store = EmbeddingStore.open(uri)
    weights = {key: query_weights(key[0], tile.images, tile.texts, key[1]) for key in settings}
    blocks = ((block.offset, block.embeddings) for block in store.iter_blocks(parts=parts))
    return weighted_top_k(tile.images, tile.texts, blocks, weights, k, tile.exclude)


@ray.remote(num_cpus=0.5, max_retries=5)
def _merge(k: int, *found: dict[Setting, TopK]) -> dict[Setting, TopK]:
    return {key: merge_top_k([part[key] for part in found], k) for key in found[0]}


def search_store(
    store: EmbeddingStore, tiles: Sequence[Tile], settings: list[Setting], *, k: int, num_shards: int
) -> Iterator[dict[Setting, TopK]]:
    """Yield the top k of each tile, in order: one pass over the gallery per tile, in `num_shards` tasks, merged as a tree."""
    shares = [list(map(int, share)) for share in np.array_split(np.arange(len(store.parts)), num_shards) if len(share)]
    waiting = []
    for tile in tiles:
        tile_ref = ray.put(tile)
        found: list[Any] = [_search_parts.remote(store.uri, share, tile_ref, settings, k) for share in shares]
        while len(found) > 1:
            found = [_merge.remote(k, *found[start : start + _FAN_IN]) for start in range(0, len(found), _FAN_IN)]
        waiting.append(found[0])
    for ref in waiting:
        yield ray.get(ref)


def retrieve(
    benchmark: Benchmark,
    store: EmbeddingStore,
    texts: Tensor,
    settings: list[Setting],
    *,
    k: int,
    num_shards: int,
    tile_size: int = 1024,
) -> dict[Setting, Ranking]:
    """Rank the gallery for every query of a benchmark and every setting.

    Args:
        benchmark: its queries and protocol; references that the protocol removes are excluded from the search.
        store: embeddings of at least the benchmark's gallery, in gallery order.
        texts: float32[Q, D], the relative captions' embeddings in query order.
        settings: methods and alphas.
        k: length of the rankings.
        num_shards: tasks that share the gallery.
        tile_size: queries per scan.
    """
    ids = store.read_ids()
    index = {name: row for row, name in enumerate(ids)}
    references = [query.reference_id for query in benchmark.queries]
    images = torch.from_numpy(np.asarray(store.take(references), dtype=np.float32))
    tiles = []
    for start in range(0, len(references), tile_size):
        rows = slice(start, start + tile_size)
        exclude = [index[name] if benchmark.reference_removed else -1 for name in references[rows]]
        tiles.append(Tile(images[rows], texts[rows], exclude))
    found: dict[Setting, list[TopK]] = {key: [] for key in settings}
    for answer in search_store(store, tiles, settings, k=k, num_shards=num_shards):
        for key in settings:
            found[key].append(answer[key])
    names = np.array([*ids, ""])  # index -1 is an empty place
    query_ids = tuple(query.query_id for query in benchmark.queries)
    rankings = {}
    for key, parts in found.items():
        indices = torch.cat([part.indices for part in parts]).numpy()
        scores = torch.cat([part.scores for part in parts]).numpy()
        protocol: dict[str, object] = {"method": key[0], "alpha": key[1], "store": store.identity}
        rankings[key] = Ranking(query_ids, names[indices], scores, protocol)
    return rankings
