"""Sharded composed retrieval on Ray: every task scans its share of a gallery once for all methods and alphas.

The result does not depend on the number of shards: scores are defined by query and image alone and ties go by gallery
index (cir_core.search), so merging the shards' lists gives what one search over everything gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import Tensor

from cir_core.benchmarks import Benchmark
from cir_core.composition import compose_gallery, query_weights, takes_alpha
from cir_core.embedding_store import EmbeddingStore
from cir_core.schema import CirError, Ranking
from cir_core.search import TopK, merge_top_k, subset_top_k, weighted_top_k

Setting = tuple[str, float | None]  # a method and its alpha, None where it has none
_FAN_IN = 8  # lists merged by one task


@dataclass(frozen=True)
class Gallery:
    """What is searched of a store.

    uri: the store. rows: int64, rising store rows; an image's gallery index is its place among them. None: every row.
    alpha: 0 searches the images' embeddings; above 0 each image that has a caption is composed with it, by slerp.
    """

    uri: str
    rows: npt.NDArray[np.int64] | None = None
    alpha: float = 0.0

    def blocks(self, parts: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Yield (gallery index of the first row, embeddings) of the store's parts."""
        columns = ("caption", "caption_embedding") if self.alpha else ()
        for block in EmbeddingStore.open(self.uri).iter_blocks(parts=parts, columns=columns):
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


@ray.remote(num_cpus=1, max_retries=5)
def _search_parts(
    gallery: Gallery, parts: list[int], tile: Tile, settings: list[Setting], k: int
) -> dict[Setting, TopK]:
    weights = {key: query_weights(key[0], tile.images, tile.texts, key[1]) for key in settings}
    blocks = gallery.blocks(parts)
    if tile.subsets is not None:
        return subset_top_k(tile.images, tile.texts, blocks, weights, tile.subsets, k)
    return weighted_top_k(tile.images, tile.texts, blocks, weights, k, tile.exclude)


@ray.remote(num_cpus=0.5, max_retries=5)
def _merge(k: int, *found: dict[Setting, TopK]) -> dict[Setting, TopK]:
    return {key: merge_top_k([part[key] for part in found], k) for key in found[0]}


class GallerySearch:
    """Searches one gallery in `num_shards` tasks a tile."""

    def __init__(self, gallery: Gallery, num_shards: int) -> None:
        parts = gallery.parts()
        if not parts:
            raise CirError(f"{gallery.uri}: no image of this store is in the gallery")
        self.shares = [list(map(int, share)) for share in np.array_split(parts, num_shards) if len(share)]
        self.gallery = ray.put(gallery)

    def start(self, tile: Tile | ray.ObjectRef[Tile], settings: list[Setting], k: int) -> Any:
        """Start one pass over the gallery; return a reference to {setting: TopK}, merged as a tree."""
        tile_ref = ray.put(tile) if isinstance(tile, Tile) else tile
        found: list[Any] = [_search_parts.remote(self.gallery, share, tile_ref, settings, k) for share in self.shares]
        while len(found) > 1:
            found = [_merge.remote(k, *found[start : start + _FAN_IN]) for start in range(0, len(found), _FAN_IN)]
        return found[0]


@dataclass(frozen=True)
class Prepared:
    """A benchmark ready to be searched in a store: its gallery, and its references' embeddings, float32[Q, D]."""

    benchmark: Benchmark
    gallery: Gallery
    references: Tensor
    protocol: Mapping[str, object] = field(default_factory=dict)  # what every ranking says of how it was made

    @classmethod
    def of(
        cls,
        benchmark: Benchmark,
        store: EmbeddingStore,
        *,
        gallery_alpha: float = 0.0,
        protocol: Mapping[str, object] | None = None,
    ) -> Prepared:
        """Find a benchmark's images in a store, which may hold others too.

        Raises:
            CirError: an image is not in the store, or twice; or the gallery's order is not the store's.
        """
        names = store.read_ids()
        places = {name: row for row, name in enumerate(names)}
        if len(places) != len(names):
            twice = next(name for row, name in enumerate(names) if places[name] != row)
            raise CirError(f"{store.uri}: image {twice!r} is in this store twice; an image needs an id of its own")
        if missing := [name for name in benchmark.image_ids if name not in places]:
            shown = ", ".join(map(repr, missing[:5]))
            raise CirError(f"{benchmark}: {len(missing)} of its images are not in store {store.uri}, such as {shown}")
        rows = np.array([places[name] for name in benchmark.gallery_ids], dtype=np.int64)
        if (np.diff(rows) <= 0).any():
            raise CirError(f"{benchmark}: store {store.uri} holds its gallery in another order, which would break ties")
        references = np.asarray(store.take([query.reference_id for query in benchmark.queries]), dtype=np.float32)
        whole = len(rows) == len(names)
        gallery = Gallery(store.uri, None if whole else rows, gallery_alpha)
        return cls(benchmark, gallery, torch.from_numpy(references), protocol or {})

    def retrieve(
        self, texts: Tensor, settings: list[Setting], *, k: int, num_shards: int, tile_size: int = 1024
    ) -> dict[Setting, Ranking]:
        """Rank the gallery, or each query's own, for every query and setting.

        Args:
            texts: float32[Q, D], the relative captions' embeddings in query order.
            settings: methods and alphas.
            k: length of the rankings.
            num_shards: tasks that share the gallery.
            tile_size: queries per scan.
        """
        if self.benchmark.own_galleries:
            return self.retrieve_subsets(texts, settings, num_shards=num_shards, tile_size=tile_size)
        index = {name: place for place, name in enumerate(self.benchmark.gallery_ids)}
        removed = self.benchmark.reference_removed
        exclude = [index.get(query.reference_id, -1) if removed else -1 for query in self.benchmark.queries]
        return self._rankings(texts, settings, exclude, None, k=k, num_shards=num_shards, tile_size=tile_size)

    def retrieve_subsets(
        self, texts: Tensor, settings: list[Setting], *, num_shards: int, tile_size: int = 1024
    ) -> dict[Setting, Ranking]:
        """Rank only each query's subset, without a reference that the protocol removes."""
        index = {name: place for place, name in enumerate(self.benchmark.gallery_ids)}
        subsets = []
        for query in self.benchmark.queries:
            left_out = query.reference_id if self.benchmark.reference_removed else None
            subsets.append([index[name] for name in query.subset_ids if name != left_out])
        k = max(map(len, subsets))
        none = [-1] * len(subsets)
        return self._rankings(texts, settings, none, subsets, k=k, num_shards=num_shards, tile_size=tile_size)

    def _rankings(
        self,
        texts: Tensor,
        settings: list[Setting],
        exclude: list[int],
        subsets: list[list[int]] | None,
        *,
        k: int,
        num_shards: int,
        tile_size: int,
    ) -> dict[Setting, Ranking]:
        search = GallerySearch(self.gallery, num_shards)
        waiting = []
        for start in range(0, len(exclude), tile_size):
            rows = slice(start, start + tile_size)
            tile = Tile(self.references[rows], texts[rows], exclude[rows], subsets[rows] if subsets else None)
            waiting.append(search.start(tile, settings, k))
        found: dict[Setting, list[TopK]] = {key: [] for key in settings}
        for ref in waiting:
            answer = ray.get(ref)
            for key in settings:
                found[key].append(answer[key])
        names = np.array([*self.benchmark.gallery_ids, ""])  # index -1 is an empty place
        query_ids = tuple(query.query_id for query in self.benchmark.queries)
        rankings = {}
        for key, parts in found.items():
            indices = torch.cat([part.indices for part in parts]).numpy()
            scores = torch.cat([part.scores for part in parts]).numpy()
            made = {"method": key[0], "alpha": key[1], **self.protocol}
            rankings[key] = Ranking(query_ids, names[indices], scores, made)
        return rankings
