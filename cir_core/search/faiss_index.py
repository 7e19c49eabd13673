"""A FAISS index over one shard of a gallery: built from its rows, or put together again from what was learnt.

Everything is deterministic: seeds are set, and FAISS builds with one thread, since the graph that several threads make
depends on their timing. Shards are built side by side instead.

Shapes: n rows of the shard, D embedding dimensions, m rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cir_core.schema import CirError
from cir_core.search.index_files import Arrays, IndexSettings, check_graph, check_lists, in_range

_KMEANS_ITERATIONS = 10
_MAX_NORM = 1e12  # as in exact search: products stay far below the float32 maximum

Rows = npt.NDArray[np.float32]
BlockSource = Callable[[], Iterable[tuple[int, Any]]]
"""Gives, at every call, all blocks of a shard in one order: (gallery index of the first row, rows [m, D]), float16 or
float32, tensors or arrays."""


def import_faiss() -> Any:
    """Return the faiss module; CirError, saying how to install it, where it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise CirError(
            f"approximate search needs FAISS ({error}): pip install 'slerp-tat[ann]', or pip install faiss-cpu"
        ) from None
    return faiss


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS works with one thread."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class ShardIndex:
    """A FAISS index that holds all rows of a shard; row i is the i-th that the block source gave.

    index: the FAISS index. arrays: what was learnt, see index_files. row_indices: int64[n], the gallery index of each row.
    max_norm: the largest norm of a row. Made by `build`, or by `restore` from arrays that `load_arrays` read.
    """

    def __init__(self, blocks: BlockSource, settings: IndexSettings, *, num_rows: int, dim: int) -> None:
        self.faiss = import_faiss()
        self.blocks, self.settings, self.num_rows, self.dim = blocks, settings, num_rows, dim
        self.half = _is_half(blocks)
        self.arrays: Arrays = {}
        self.row_indices = np.empty(num_rows, np.int64)
        self.max_norm = 0.0
        self.index: Any = None

    @classmethod
    def build(cls, blocks: BlockSource, settings: IndexSettings, *, num_rows: int, dim: int) -> ShardIndex:
        """Learn the structure of a shard (ivf reads the blocks twice) and add its rows.

        Raises CirError for blocks that do not have this many rows, another D, several dtypes, NaN or infinity.
        """
        self = cls(blocks, settings, num_rows=num_rows, dim=dim)
        with one_thread():
            if settings.kind == "ivf":
                self._build_ivf()
            else:
                self._build_hnsw()
        return self

    @classmethod
    def restore(
        cls, blocks: BlockSource, settings: IndexSettings, arrays: Arrays, *, num_rows: int, dim: int
    ) -> ShardIndex:
        """Put an index together from its arrays and the rows; it answers as the one that was built, bit for bit.

        Raises CirError as `build` does, and for arrays that do not fit.
        """
        self = cls(blocks, settings, num_rows=num_rows, dim=dim)
        self.arrays = arrays
        with one_thread():
            if settings.kind == "ivf":
                check_lists(arrays, settings, num_rows, dim)
                self._make_ivf()
                self._fill(self._add_to_lists)
            else:
                offsets = check_graph(arrays, settings, num_rows)
                self._make_hnsw()
                self._fill(lambda rows, _: self.index.storage.add(rows))
                self._set_graph(offsets)
        return self

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """Return rows of the shard as float32, exactly as the block source gave them."""
        found: Rows = self.index.reconstruct_batch(np.ascontiguousarray(numbers))
        return found

    def search(self, queries: Rows, num_results: int, depth: int) -> tuple[Rows, npt.NDArray[np.int64]]:
        """Return FAISS's scores and row numbers [Q, num_results], best first, -1 past the end.

        depth: inverted lists that are looked into (nprobe), or candidates held while the graph is walked (efSearch).
        """
        if self.settings.kind == "ivf":
            asked = self.faiss.SearchParametersIVF(nprobe=depth)
        else:
            asked = self.faiss.SearchParametersHNSW(efSearch=depth)
        found: tuple[Rows, npt.NDArray[np.int64]] = self.index.search(queries, num_results, params=asked)
        return found

    def _build_ivf(self) -> None:
        centroids = _kmeans(self.faiss, self._training_rows(), self.settings)
        self.arrays = {"centroids": centroids, "lists": np.empty(self.num_rows, np.int32)}
        self._make_ivf()

        def assign(rows: Rows, start: int) -> None:
            self.arrays["lists"][start : start + len(rows)] = self.index.quantizer.search(rows, 1)[1][:, 0]
            self._add_to_lists(rows, start)

        self._fill(assign)

    def _make_ivf(self) -> None:
        faiss, metric, centroids = self.faiss, self.faiss.METRIC_INNER_PRODUCT, self.arrays["centroids"]
        quantizer = faiss.IndexFlatIP(self.dim)
        quantizer.add(np.ascontiguousarray(centroids))
        if self.half:  # float16 rows are kept as they are: half the memory, nothing lost
            kept = faiss.ScalarQuantizer.QT_fp16
            self.index = faiss.IndexIVFScalarQuantizer(quantizer, self.dim, len(centroids), kept, metric, False)
            self.index.train(centroids)  # nothing to learn in fp16; the lists have their centroids already
        else:
            self.index = faiss.IndexIVFFlat(quantizer, self.dim, len(centroids), metric)
        self.index.set_direct_map_type(faiss.DirectMap.Array)  # finds a row by its number

    def _add_to_lists(self, rows: Rows, start: int) -> None:
        lists = self.arrays["lists"][start : start + len(rows)].astype(np.int64)
        pointer = self.faiss.swig_ptr
        self.index.add_core(len(rows), pointer(rows), None, pointer(lists))  # None: numbered in sequence

    def _build_hnsw(self) -> None:
        self._make_hnsw()
        graph = self.index.hnsw
        graph.rng = self.faiss.RandomGenerator(self.settings.seed)
        graph.efConstruction = self.settings.ef_construction
        self._fill(lambda rows, _: self.index.add(rows))
        self.arrays = {name: self.faiss.vector_to_array(getattr(graph, name)) for name in ("levels", "neighbors")}
        self.arrays["entry_point"] = np.array([graph.entry_point], np.int32)

    def _make_hnsw(self) -> None:
        faiss, metric, links = self.faiss, self.faiss.METRIC_INNER_PRODUCT, self.settings.hnsw_m
        if self.half:
            self.index = faiss.IndexHNSWSQ(self.dim, faiss.ScalarQuantizer.QT_fp16, links, metric)
        else:
            self.index = faiss.IndexHNSWFlat(self.dim, links, metric)

    def _set_graph(self, offsets: npt.NDArray[np.uint64]) -> None:
        graph = self.index.hnsw
        for name, value in (self.arrays | {"offsets": offsets}).items():
            if name != "entry_point":
                self.faiss.copy_array_to_vector(np.ascontiguousarray(value), getattr(graph, name))
        graph.entry_point = int(self.arrays["entry_point"][0])
        graph.max_level = int(self.arrays["levels"].max()) - 1
        self.index.ntotal = self.num_rows

    def _fill(self, add: Callable[[Rows, int], Any]) -> None:
        """Add all rows by `add(rows, number of the first)`, and note where they lie and their largest norm."""
        for start, offset, rows in self._iter_rows():
            add(rows, start)
            self.max_norm = max(self.max_norm, float(np.linalg.norm(rows, axis=1).max()))
            self.row_indices[start : start + len(rows)] = np.arange(offset, offset + len(rows))

    def _training_rows(self) -> Rows:
        """Return a seeded sample of the rows, float32[train_rows, D]."""
        wanted = in_range("train_rows", self.settings.train_rows, self.settings.nlist, self.num_rows)
        chosen = np.sort(np.random.default_rng(self.settings.seed).choice(self.num_rows, wanted, replace=False))
        return np.concatenate(
            [rows[chosen[slice(*np.searchsorted(chosen, [start, start + len(rows)]))] - start]
             for start, _, rows in self._iter_rows()]
        )  # fmt: skip

    def _iter_rows(self) -> Iterator[tuple[int, int, Rows]]:
        """Yield (number of the first row, its gallery index, rows float32 [m, D]), checked."""
        done = 0
        for offset, block in self.blocks():
            if len(block) == 0:
                continue
            rows = _as_array(block)
            if rows.ndim != 2 or rows.shape[1] != self.dim or (rows.dtype == np.float16) != self.half:
                raise CirError(
                    f"approximate index: a block is {rows.dtype} {list(rows.shape)}; all must be [rows, {self.dim}] of one "
                    "dtype, float16 or float32"
                )
            rows = np.ascontiguousarray(rows, np.float32)
            bad = ~(np.linalg.norm(rows, axis=1) <= _MAX_NORM)
            if bad.any():
                raise CirError(
                    f"gallery row {offset + int(bad.argmax())} holds NaN, infinity or a norm above {_MAX_NORM:g}: embeddings "
                    "must be finite; embed that image again or leave it out"
                )
            if done + len(rows) <= self.num_rows:
                yield done, offset, rows
            done += len(rows)
        if done != self.num_rows:
            raise CirError(f"approximate index: the blocks have {done} rows, {self.num_rows} were expected")


def _kmeans(faiss: Any, rows: Rows, settings: IndexSettings) -> Rows:
    """Return centroids of unit norm, float32[nlist, D], since rows are compared by inner product."""
    clustering = faiss.Clustering(rows.shape[1], settings.nlist)
    clustering.seed, clustering.niter, clustering.spherical = settings.seed, _KMEANS_ITERATIONS, True
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = (
        1,
        len(rows),
    )  # the sample is chosen already
    clustering.train(rows, faiss.IndexFlatIP(rows.shape[1]))
    centroids: Rows = faiss.vector_to_array(clustering.centroids).reshape(settings.nlist, -1)
    return centroids


def _is_half(blocks: BlockSource) -> bool:
    """Whether the rows are float16, as the first block that has some tells."""
    return next((_as_array(block).dtype == np.float16 for _, block in blocks() if len(block)), False)


def _as_array(block: Any) -> npt.NDArray[Any]:
    array = block.detach().cpu().numpy() if isinstance(block, torch.Tensor) else np.asarray(block)
    if array.dtype not in (np.float16, np.float32):
        raise CirError(f"approximate index: blocks must be float16 or float32, not {array.dtype}")
    return array
