"""A benchmark's queries ranked over its gallery on Ray, see gallery_search.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import ray
import torch
from torch import Tensor

from cir_core.benchmarks import Benchmark
from cir_core.embedding_store import EmbeddingStore
from cir_core.schema import CirError, Ranking
from cir_core.search import TopK
from jobs.gallery_search import Gallery, GallerySearch, Setting, Tile


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
        self,
        texts: Tensor,
        settings: list[Setting],
        *,
        k: int,
        num_shards: int,
        memory_gb: float,
        tile_size: int = 1024,
    ) -> dict[Setting, Ranking]:
        """Rank the gallery, or each query's own, for every query and setting.

        Args:
            texts: float32[Q, D], the relative captions' embeddings in query order.
            settings: methods and alphas.
            k: length of the rankings.
            num_shards: tasks or actors that share the gallery.
            memory_gb: what each of them may hold of it.
            tile_size: queries per scan.
        """
        if self.benchmark.own_galleries:
            return self.retrieve_subsets(
                texts, settings, num_shards=num_shards, memory_gb=memory_gb, tile_size=tile_size
            )
        index = {name: place for place, name in enumerate(self.benchmark.gallery_ids)}
        removed = self.benchmark.reference_removed
        exclude = [index.get(query.reference_id, -1) if removed else -1 for query in self.benchmark.queries]
        return self._rankings(
            texts, settings, exclude, None, k=k, num_shards=num_shards, memory_gb=memory_gb, tile_size=tile_size
        )

    def retrieve_subsets(
        self, texts: Tensor, settings: list[Setting], *, num_shards: int, memory_gb: float, tile_size: int = 1024
    ) -> dict[Setting, Ranking]:
        """Rank only each query's subset, without a reference that the protocol removes."""
        index = {name: place for place, name in enumerate(self.benchmark.gallery_ids)}
        subsets = []
        for query in self.benchmark.queries:
            left_out = query.reference_id if self.benchmark.reference_removed else None
            subsets.append([index[name] for name in query.subset_ids if name != left_out])
        k = max(map(len, subsets))
        none = [-1] * len(subsets)
        return self._rankings(
            texts, settings, none, subsets, k=k, num_shards=num_shards, memory_gb=memory_gb, tile_size=tile_size
        )

    def _rankings(
        self,
        texts: Tensor,
        settings: list[Setting],
        exclude: list[int],
        subsets: list[list[int]] | None,
        *,
        k: int,
        num_shards: int,
        memory_gb: float,
        tile_size: int,
    ) -> dict[Setting, Ranking]:
        num_tiles = -(-len(exclude) // tile_size)
        search = GallerySearch(self.gallery, num_shards, memory_gb=memory_gb, num_tiles=num_tiles)
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
