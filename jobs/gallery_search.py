"""Sharded composed retrieval on Ray: every shard scans its share of a gallery once a tile for all methods and alphas.

The result does not depend on the number of shards: scores are defined by query and image alone and ties go by gallery
index (cir_core.search), so merging the shards' lists gives what one search over everything gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import Tensor

from cir_core.composition import compose_gallery, query_weights, takes_alpha
from cir_core.embedding_store import Embeddings, EmbeddingStore
from cir_core.schema import CirError
from cir_core.search import (
    PreparedGallery,
    TopK,
    merge_top_k,
    prepare_gallery,
    read_ahead,
    subset_top_k,
    weighted_top_k,
)
from jobs.progress import StageMetrics
from jobs.session import check_memory

FAN_IN = 8  # lists merged by one task
_HELD_BYTES = 4  # an element: float16 as stored and bfloat16 as scanned
_ACTOR_BYTES = 200_000_000  # held; below, a pass takes less than an actor's start

Setting = tuple[str, float | None]  # a method and its alpha, None where it has none


@dataclass(frozen=True)
class Gallery:
    """What is searched of a store.

    uri: the store. rows: int64, rising store rows; an image's gallery index is its place among them. None: every row.
    alpha: 0 searches the images' embeddings; above 0 each image that has a caption is composed with it, by slerp.
    """

    uri: str
    rows: npt.NDArray[np.int64] | None = None
    alpha: float = 0.0

    def blocks(self, parts: Sequence[int], block_rows: int = 65_536) -> Iterator[tuple[int, Any]]:
        """Yield (gallery index of the first row, embeddings) of the store's parts."""
        columns = ("caption", "caption_embedding") if self.alpha else ()
        for block in EmbeddingStore.open(self.uri).iter_blocks(block_rows, parts=parts, columns=columns):
            rows: Any = block.embeddings
            if self.alpha:
                captioned = torch.tensor([bool(text) for text in block.columns["caption"]])
                texts = np.asarray(block.columns["caption_embedding"])
                rows = compose_gallery(rows, texts, captioned, self.alpha)
            if self.rows is None:
                yield block.offset, rows
                continue
            low, high = np.searchsorted(self.rows, [block.offset, block.offset + len(rows)])
            if high > low:
                yield int(low), rows[self.rows[low:high] - block.offset]

    def held_bytes(self, shares: Sequence[Sequence[int]]) -> list[int]:
        """Return what holding each share's parts takes, with the copy that is scanned; of a gallery of some rows, all rows."""
        manifest = EmbeddingStore.open(self.uri).manifest  # a second for 100,000 parts: once for all shares
        rows = {part.index: part.num_rows for part in manifest.parts}
        return [sum(rows[part] for part in share) * manifest.spec.dim * _HELD_BYTES for share in shares]

    def parts(self) -> list[int]:
        """Return the store's parts that hold an image of the gallery."""
        found, start = [], 0
        for part in EmbeddingStore.open(self.uri).parts:
            end = start + part.num_rows
            held = part.num_rows if self.rows is None else int(np.diff(np.searchsorted(self.rows, [start, end]))[0])
            if held:
                found.append(part.index)
            start = end
        return found


@dataclass(frozen=True)
class Tile:
    """A batch of queries that one scan answers.

    images, texts: float32[Q, D]. exclude: gallery index that a query's list leaves out, or -1, [Q]. subsets: where given,
    each query ranks only these gallery indices (and exclude is not looked at).
    """

    images: Tensor
    texts: Tensor
    exclude: list[int]
    subsets: list[list[int]] | None = None


def settings_of(methods: Sequence[str], alphas: Sequence[float]) -> list[Setting]:
    """Return every method with every alpha it takes."""
    return [(name, alpha) for name in methods for alpha in (alphas if takes_alpha(name) else [None])]


class Shard:
    """One share of a gallery: streamed from the store in every pass, or held where memory allows it.

    memory_gb: what it may hold. A share that fits, with the copy that is scanned, is read and prepared at the first tile;
    of another one a pass holds two blocks, the one that is searched and the next one, which is read meanwhile.
    neighbours: shares there are, to divide this node's CPUs among those that it has; 0 leaves the threads there are.
    """

    def __init__(
        self, gallery: Gallery, parts: list[int], memory_gb: float, *, keep: bool, neighbours: int = 0
    ) -> None:
        self.gallery, self.parts = gallery, parts
        spec_dim, budget = self._store.manifest.spec.dim, memory_gb * 1e9
        # float16 as stored, twice that where captions are composed in, and float32 at worst of what is gathered
        self.block_rows = int(max(1024, min(65_536, budget / 4 / (spec_dim * 4))))
        (held,) = gallery.held_bytes([parts])
        self.keep = keep and held <= budget
        if neighbours:
            torch.set_num_threads(_threads_here(neighbours, held if self.keep else 0))
        self._held: list[tuple[int, PreparedGallery]] | None = None  # set once, complete: another thread looks
        self._metrics = StageMetrics("batch_retrieve", "tiles")

    def _blocks(self) -> Any:
        if not self.keep:
            return read_ahead(self.gallery.blocks(self.parts, self.block_rows))
        if self._held is None:
            blocks = read_ahead(self.gallery.blocks(self.parts, self.block_rows))
            self._held = [(start, prepare_gallery(rows)) for start, rows in blocks]
        return self._held

    @ray.method(concurrency_group="lookups")
    def embeddings_at(self, rows: npt.NDArray[np.int64]) -> Embeddings:
        """Return the store's embeddings [n, D] of its rows [n], which are of this share: held ones, else read."""
        if self._held is None or self.gallery.alpha or self.gallery.rows is not None:  # not as they are in the store
            return self._store.embeddings_at(rows)
        found = np.empty((len(rows), self._store.manifest.spec.dim), self._store.manifest.spec.dtype)
        for start, block in self._held:
            here = np.flatnonzero((rows >= start) & (rows < start + len(block)))
            found[here] = np.asarray(block.rows)[rows[here] - start]
        return found

    @cached_property
    def _store(self) -> EmbeddingStore:
        return EmbeddingStore.open(self.gallery.uri)

    def search(self, tile: Tile, settings: list[Setting], k: int) -> dict[Setting, TopK]:
        """Return the share's best k, or each query's own rows of it, of every setting."""
        with self._metrics.measured("search"):
            found = self._search(tile, settings, k)
        self._metrics.count("tiles", 1)
        return found

    def _search(self, tile: Tile, settings: list[Setting], k: int) -> dict[Setting, TopK]:
        weights = {key: query_weights(key[0], tile.images, tile.texts, key[1]) for key in settings}
        if tile.subsets is not None:
            return subset_top_k(tile.images, tile.texts, self._blocks(), weights, tile.subsets, k)
        return weighted_top_k(tile.images, tile.texts, self._blocks(), weights, k, tile.exclude)


# An actor that dies is started again elsewhere, reads its share again and does the tile again. It reserves next to no CPU,
# as it is idle between tiles, but is spread over the nodes that have some; and the memory of a share that it holds.
# It says what it holds while it searches: a thread apart.
_ShardActor = ray.remote(
    num_cpus=0.01,
    max_restarts=-1,
    max_task_retries=5,
    scheduling_strategy="SPREAD",
    concurrency_groups={"lookups": 1},
)(Shard)


def threads_of(num_shares: int, node_cpus: Sequence[float], cpus: float, fitting: float = math.inf) -> int:
    """Return the threads of a share on a node of `cpus`; Ray would give it one, as it reserves none.

    Ray counts what a container may use, which the process does not see. node_cpus: of all nodes there are, over which the
    shares are spread; more may come. fitting: shares that this node's memory has room for.
    """
    spread_over = sum(count >= 1 for count in node_cpus)
    here = max(1.0, min(-(-num_shares // max(1, spread_over)), fitting))
    return max(1, int(cpus // here))


def _threads_here(num_shares: int, held_bytes: int) -> int:
    """Return the threads of a share that this process holds."""
    own = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    fitting = nodes[own].get("memory", 0.0) // held_bytes if held_bytes else math.inf
    return threads_of(
        num_shares, [node.get("CPU", 0.0) for node in nodes.values()], nodes[own].get("CPU", 1.0), fitting
    )


@ray.remote(num_cpus=1, max_retries=5)
def _search_once(
    gallery: Gallery, parts: list[int], memory_gb: float, tile: Tile, settings: list[Setting], k: int
) -> dict[Setting, TopK]:
    return Shard(gallery, parts, memory_gb, keep=False).search(tile, settings, k)


@ray.remote(num_cpus=0.5, max_retries=5)
def _merge(k: int, *found: dict[Setting, TopK]) -> dict[Setting, TopK]:
    return {key: merge_top_k([part[key] for part in found], k) for key in found[0]}


def merged(found: Sequence[Any], k: int) -> Any:
    """Merge references to shares' lists by tasks, as a tree; return a reference to the lists of all."""
    while len(found) > 1:
        found = [_merge.remote(k, *found[start : start + FAN_IN]) for start in range(0, len(found), FAN_IN)]
    return found[0]


class GallerySearch:
    """Searches one gallery in `num_shards` shares, as actors that hold theirs, or in tasks.

    num_tiles: how many will be searched, None if that is not known. Actors are worth their start for several tiles of a
    gallery of some size; the answers are the same.
    """

    def __init__(
        self, gallery: Gallery, num_shards: int, *, memory_gb: float = 4.0, num_tiles: int | None = None
    ) -> None:
        parts = gallery.parts()
        if not parts:
            raise CirError(f"{gallery.uri}: no image of this store is in the gallery")
        self.shares = [list(map(int, share)) for share in np.array_split(parts, num_shards) if len(share)]
        self.gallery, self.memory_gb = ray.put(gallery), memory_gb
        many = num_tiles is None or num_tiles > 1
        self.actors: list[Any] = []
        held = gallery.held_bytes(self.shares)
        if many and sum(held) >= _ACTOR_BYTES:
            reserved = [size if size <= memory_gb * 1e9 else 0 for size in held]
            check_memory(reserved)
            self.actors = [
                _ShardActor.options(memory=size).remote(
                    self.gallery, share, memory_gb, keep=True, neighbours=len(self.shares)
                )
                for share, size in zip(self.shares, reserved, strict=True)
            ]

    def start(self, tile: Tile | ray.ObjectRef[Tile], settings: list[Setting], k: int) -> Any:
        """Start one pass over the gallery; return a reference to {setting: TopK}, merged as a tree."""
        tile_ref = ray.put(tile) if isinstance(tile, Tile) else tile
        found: list[Any]
        if self.actors:
            found = [actor.search.remote(tile_ref, settings, k) for actor in self.actors]
        else:
            found = [
                _search_once.remote(self.gallery, share, self.memory_gb, tile_ref, settings, k) for share in self.shares
            ]
        return merged(found, k)
