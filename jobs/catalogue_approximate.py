"""Approximate search of a catalogue on Ray; what it misses is measured in every run, see catalogue_recall.py.

Every shard of the store has a FAISS index of its own, made once and kept, so that the next night's queries find it:

    <storage_path>/approximate_indexes/<digest>/shard-00000.safetensors, .json    see cir_core/search/index_files.py

The digest is of the store's identity and checksums, the shard's parts, the settings and FAISS's version. No setting names
an index, so none is opened but those of this folder, and these are plain arrays: FAISS parses no file. A worker holds one
shard's index at a time; where there are at least as many CPUs as shards, each stays loaded.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cir_core import files
from cir_core.composition import query_weights
from cir_core.embedding_store import EmbeddingStore
from cir_core.schema import CirError
from cir_core.search import TopK
from cir_core.search.approximate import (
    IndexSettings,
    ShardIndex,
    approximate_top_k,
    checked_depth,
    default_depth,
)
from cir_core.search.faiss_index import import_faiss
from cir_core.search.index_files import load_arrays, save_arrays
from jobs.gallery_search import Gallery, Setting, Tile, merged
from jobs.session import say
from jobs.storage import absolute

if TYPE_CHECKING:
    from jobs.batch_retrieve import BatchRetrieveConfig

FOR_APPROXIMATE = (
    "nlist", "train_rows", "nprobe", "hnsw_m", "ef_construction", "ef_search", "recall_queries",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Share:
    """A shard of the store: its parts, its rows, how its index is made and how deep it is searched."""

    parts: tuple[int, ...]
    num_rows: int
    settings: IndexSettings
    depth: int
    made: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ApproximatePlan:
    """All that a run needs to search approximately. folder: of the indexes; described: for people and rankings."""

    gallery: Gallery
    dim: int
    shares: tuple[Share, ...]
    folder: str
    described: str
    recall_queries: int
    seed: int

    def name(self, number: int) -> str:
        """Return where a shard's index lies, without a suffix."""
        return files.join(self.folder, f"shard-{number:05d}")

    @property
    def claim(self) -> dict[str, Any]:
        """What decides the lists and the measurement."""
        return {
            "search": self.described,
            "index": self.folder.rpartition("/")[2],
            "recall_queries": self.recall_queries,
            "seed": self.seed,
        }


def plan_approximate(config: BatchRetrieveConfig, store: EmbeddingStore) -> ApproximatePlan | None:
    """Return the plan of an approximate search, None for an exact one.

    Raises:
        CirError: FAISS is missing; a setting does not fit the search, the store or its shards.
    """
    if config.approximate is None:
        config.refuse(FOR_APPROXIMATE, "without --approximate ivf or hnsw")
        return None
    faiss = import_faiss()
    other = "ef_search" if config.approximate == "ivf" else "nprobe"
    config.refuse([other], f"with --approximate {config.approximate}")
    if config.k > store.num_rows:
        raise CirError(f"--k {config.k} is more than the {store.num_rows} images of the gallery")
    gallery = Gallery(store.uri, alpha=config.gallery_alpha)
    groups = [group for group in np.array_split(gallery.parts(), config.num_shards) if len(group)]
    shares = tuple(_share(config, store, tuple(map(int, group)), faiss.__version__) for group in groups)
    digest = hashlib.sha256(json.dumps([dict(share.made) for share in shares], sort_keys=True).encode()).hexdigest()
    return ApproximatePlan(
        gallery=gallery,
        dim=store.manifest.spec.dim,
        shares=shares,
        folder=files.join(absolute(config.storage_path), "approximate_indexes", digest[:16]),
        described=_described(shares, faiss.__version__),
        recall_queries=config.recall_queries,
        seed=config.seed,
    )


def _share(config: BatchRetrieveConfig, store: EmbeddingStore, parts: tuple[int, ...], version: str) -> Share:
    held = [store.parts[index] for index in parts]
    num_rows = sum(part.num_rows for part in held)
    settings = IndexSettings.derived(
        config.approximate or "",
        num_rows,
        nlist=config.nlist,
        train_rows=config.train_rows,
        hnsw_m=config.hnsw_m,
        ef_construction=config.ef_construction,
        seed=config.seed,
    )
    given = config.nprobe if config.approximate == "ivf" else config.ef_search
    depth = default_depth(settings, config.k) if given is None else checked_depth(settings, given, config.k)
    content = hashlib.sha256("".join(part.sha256 for part in held).encode()).hexdigest()
    made = {
        "store": store.identity,
        "parts": list(parts),
        "content": content,
        "num_rows": num_rows,
        "dim": store.manifest.spec.dim,
        "gallery_alpha": config.gallery_alpha,
        "faiss": version,
        **asdict(settings),
    }
    return Share(parts=parts, num_rows=num_rows, settings=settings, depth=depth, made=made)


def _described(shares: Sequence[Share], version: str) -> str:
    """Return e.g. 'approximate, ivf: 2 shards, nlist 46 to 48, train_rows 2944, nprobe 8, seed 0 (faiss 1.15.1)'."""
    ivf = shares[0].settings.kind == "ivf"
    names = ("nlist", "train_rows") if ivf else ("hnsw_m", "ef_construction")
    values = {name: [getattr(share.settings, name) for share in shares] for name in names}
    values["nprobe" if ivf else "ef_search"] = [share.depth for share in shares]
    shown = ", ".join(
        f"{name} {min(each)}" + (f" to {max(each)}" if min(each) < max(each) else "") for name, each in values.items()
    )
    seed = shares[0].settings.seed
    return f"approximate, {shares[0].settings.kind}: {len(shares)} shards, {shown}, seed {seed} (faiss {version})"


class IndexWorker:
    """An actor that searches shards; it holds the index of one at a time."""

    def __init__(self, plan: ApproximatePlan) -> None:
        self.plan = plan
        self._held: tuple[int, ShardIndex] | None = None

    def prepare(self, number: int) -> tuple[bool, float]:
        """Load a shard's index, or make and keep it; return whether it was made, and the seconds that took.

        Raises:
            CirError: the file there is another index, or damaged.
        """
        started = time.perf_counter()
        share, name = self.plan.shares[number], self.plan.name(number)
        arrays = load_arrays(name, share.made)
        self._held = None  # its memory is needed
        shape = {"num_rows": share.num_rows, "dim": self.plan.dim}
        if arrays is not None:
            index = ShardIndex.restore(lambda: self._blocks(share), share.settings, arrays, **shape)
        else:
            index = ShardIndex.build(lambda: self._blocks(share), share.settings, **shape)
            save_arrays(name, index.arrays, share.made)
        self._held = (number, index)
        return arrays is None, time.perf_counter() - started

    def search(self, number: int, tile: Tile, settings: list[Setting], k: int) -> dict[Setting, TopK]:
        """Return the lists of a shard for a tile of queries."""
        if self._held is None or self._held[0] != number:
            self.prepare(number)
        assert self._held is not None  # noqa: S101 - for mypy
        weights = {key: query_weights(key[0], tile.images, tile.texts, key[1]) for key in settings}
        depth = self.plan.shares[number].depth
        return approximate_top_k(self._held[1], tile.images, tile.texts, weights, k, depth=depth, exclude=tile.exclude)

    def _blocks(self, share: Share) -> Iterator[tuple[int, Any]]:
        return self.plan.gallery.blocks(share.parts)


def _actor(number: int) -> Any:
    """Return the class of the n-th worker, to run on one node after the other, a head without CPUs left out.

    It reserves no CPU: it waits while parts are read and encoded, and those tasks need whole CPUs to end.
    """
    nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    place = NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=True) if nodes else "SPREAD"
    return ray.remote(num_cpus=0, max_restarts=5, max_task_retries=5, scheduling_strategy=place)(IndexWorker)


class ApproximateSearch:
    """Searches a gallery by its shards' indexes; to a part it looks like `GallerySearch`. shares: parts of each shard."""

    def __init__(self, plan: ApproximatePlan) -> None:
        self.plan = plan
        self.shares = [list(share.parts) for share in plan.shares]
        num_workers = min(len(plan.shares), max(1, int(ray.cluster_resources().get("CPU", 1))))
        self.workers = [_actor(number).remote(plan) for number in range(num_workers)]

    def prepare(self) -> float:
        """Make the indexes that are not there, load the rest; return the seconds that took, summed over the shards."""
        waiting = [self._worker(number).prepare.remote(number) for number in range(len(self.shares))]
        num_made, total, last = 0, 0.0, time.perf_counter()
        for number, ref in enumerate(waiting):
            made, seconds = ray.get(ref)
            num_made, total = num_made + made, total + seconds
            if time.perf_counter() - last > 5:
                last = time.perf_counter()
                say(f"{number + 1}/{len(waiting)} indexes ready")
        say(f"{num_made} indexes made, {len(waiting) - num_made} loaded from {self.plan.folder}, {total:.1f} s of work")
        return total

    def start(self, tile: Any, settings: list[Setting], k: int) -> Any:
        """Start the search of a tile (or a reference to one); return a reference to {setting: TopK}."""
        found = [self._worker(number).search.remote(number, tile, settings, k) for number in range(len(self.shares))]
        return merged(found, k)

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            ray.kill(worker)

    def _worker(self, number: int) -> Any:
        return self.workers[number % len(self.workers)]
