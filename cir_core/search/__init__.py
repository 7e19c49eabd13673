"""Exact top-k search of composed queries over a gallery that arrives in blocks: any size, one pass, any
device.

The score of query q and image g is, by definition, the float32 rounding of

    image_weight[q] * dot(v[q], g) + text_weight[q] * dot(w[q], g)

in float64, where dot adds its D products in one fixed order (top_k.pair_dots). The value depends on the two
rows alone: not on blocks, shards, batches of queries, threads or device. Results are ordered by (-score,
gallery index). So shards merged by `merge_top_k` equal one search over everything, bit for bit, and so does a
search that was resumed.

Scanning is fast low-precision matrix products with a proven bound on their error; whatever the bound cannot rule
out is scored by the definition (compiled_scan.py on a CPU, device_scan.py on a GPU with fast bfloat16, which no CUDA device
has run so far, scan.py elsewhere). Heavy duplication therefore costs time,
never correctness.

Shapes: Q queries, D embedding dimensions, k results, n rows of a block, K named weight pairs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from cir_core.composition import query_weights
from cir_core.schema import CirError
from cir_core.search.blocks import Block, GalleryBlocks, PreparedGallery, as_query_rows
from cir_core.search.prepared import prepare_gallery
from cir_core.search.queries import IndexLists, LinearQueries
from cir_core.search.read_ahead import read_ahead
from cir_core.search.single_pass import SubsetRanking, checked_k, gallery_scan, one_pass
from cir_core.search.top_k import TopK, merge_top_k

__all__ = [
    "Block",
    "GalleryBlocks",
    "PreparedGallery",
    "TopK",
    "exact_top_k",
    "merge_top_k",
    "prepare_gallery",
    "read_ahead",
    "subset_top_k",
    "sweep_top_k",
    "weighted_top_k",
    "weighted_top_k_with_subsets",
]

Key = TypeVar("Key", bound=Hashable)


def exact_top_k(queries: Block, gallery_blocks: GalleryBlocks, k: int, *, exclude: IndexLists | None = None) -> TopK:
    """The k gallery rows with the highest inner product with each query; cosine where both have unit norm.

    queries: float16, bfloat16 or float32 [Q, D] (Tensor or ndarray), on the device that does the work.
    gallery_blocks: one [N, D] Tensor or ndarray of these dtypes, or what `prepare_gallery` made of one; or an iterable of such blocks, numbered in
    sequence from 0; or an iterable of (offset, block) pairs in any order, where row i of a block has gallery
    index offset + i.
    exclude: gallery indices kept out of a query's result: int64[Q], int64[Q, m] or Q lists; -1 is none.
    Returns scores float32[Q, k] and indices int64[Q, k], best first by (-score, index); -inf and -1 past the
    last image.
    Raises CirError for mismatched D, NaN or infinity, other dtypes, k < 1, overlapping blocks, and a gallery
    without rows.
    """
    rows = as_query_rows(queries, "queries")
    ones = torch.ones(1, 1, len(rows), dtype=torch.float64, device=rows.device)
    return _search(LinearQueries.checked((rows,), ones), gallery_blocks, k, exclude)[0]


def weighted_top_k(
    image_queries: Block,
    text_queries: Block,
    gallery_blocks: GalleryBlocks,
    weights: Mapping[Key, tuple[Tensor, Tensor]],
    k: int,
    exclude: IndexLists | None = None,
) -> dict[Key, TopK]:
    """Top k of every named weighting of the same queries, in one pass over the gallery.

    weights: name -> (image_weight, text_weight), each [Q], as `composition.query_weights` returns them: for
    example {("nlerp", 0.8): query_weights("nlerp", image, text, 0.8), "sum": query_weights("sum", image,
    text)}. The rest, results and errors as in `exact_top_k`.
    """
    return dict(
        zip(
            weights,
            _search(_linear(image_queries, text_queries, weights), gallery_blocks, k, exclude),
            strict=True,
        )
    )


def sweep_top_k(
    image_queries: Block,
    text_queries: Block,
    gallery_blocks: GalleryBlocks,
    alphas: Sequence[float],
    k: int,
    exclude: IndexLists | None = None,
) -> dict[float, TopK]:
    """Top k of slerp(image, text, alpha) for every alpha, in one pass over the gallery.

    image_queries, text_queries: [Q, D] of unit norm. alphas: in [0, 1], at least one. The rest as in
    `exact_top_k`.
    """
    image, text = as_query_rows(image_queries, "image_queries"), as_query_rows(text_queries, "text_queries")
    if image.shape != text.shape:
        raise CirError(f"image_queries {list(image.shape)} and text_queries {list(text.shape)} must share one shape")
    weights = {alpha: query_weights("slerp", image, text, alpha) for alpha in alphas}
    return weighted_top_k(image, text, gallery_blocks, weights, k, exclude)


def subset_top_k(
    image_queries: Block,
    text_queries: Block,
    gallery_blocks: GalleryBlocks,
    weights: Mapping[Key, tuple[Tensor, Tensor]],
    subsets: IndexLists,
    k: int | None = None,
) -> dict[Key, TopK]:
    """As `weighted_top_k`, but every query ranks only its own gallery indices (CIRR's group, GeneCIS's small
    galleries).

    subsets: Q lists of gallery indices (or int64[Q, m], -1 is none); scores are those of `weighted_top_k`,
    bit for bit.
    k: at most so many; the longest subset by default. An index that no block holds is absent from the result
    (another shard may hold it): after merging, a caller who knows the subset compares the lengths.
    """
    queries = _linear(image_queries, text_queries, weights)
    own = SubsetRanking(queries, subsets, None if k is None else checked_k(k))
    one_pass(queries, gallery_blocks, [own])
    return dict(zip(weights, own.results(), strict=True))


def weighted_top_k_with_subsets(
    image_queries: Block,
    text_queries: Block,
    gallery_blocks: GalleryBlocks,
    weights: Mapping[Key, tuple[Tensor, Tensor]],
    k: int,
    exclude: IndexLists | None,
    subsets: IndexLists,
) -> tuple[dict[Key, TopK], dict[Key, TopK]]:
    """`weighted_top_k` and `subset_top_k` in one pass over the gallery."""
    queries = _linear(image_queries, text_queries, weights)
    whole, own = gallery_scan(queries, checked_k(k), exclude), SubsetRanking(queries, subsets, None)
    one_pass(queries, gallery_blocks, [whole, own])
    return dict(zip(weights, whole.results(), strict=True)), dict(zip(weights, own.results(), strict=True))


def _search(queries: LinearQueries, gallery_blocks: GalleryBlocks, k: int, exclude: IndexLists | None) -> list[TopK]:
    scan = gallery_scan(queries, checked_k(k), exclude)
    one_pass(queries, gallery_blocks, [scan])
    return scan.results()


def _linear(image: Block, text: Block, weights: Mapping[Key, tuple[Tensor, Tensor]]) -> LinearQueries:
    if not weights:
        raise CirError("no weights (or alphas) to search with: give at least one")
    image_QD, text_QD = as_query_rows(image, "image_queries"), as_query_rows(text, "text_queries")
    pairs = []
    for name, pair in weights.items():
        stacked = [torch.as_tensor(weight, dtype=torch.float64, device=image_QD.device) for weight in pair]
        if len(stacked) != 2 or any(weight.shape != image_QD.shape[:1] for weight in stacked):
            raise CirError(f"weights[{name!r}] must be two tensors [{len(image_QD)}], one weight a query")
        pairs.append(torch.stack(stacked))
    return LinearQueries.checked((image_QD, text_QD.to(image_QD.device)), torch.stack(pairs))
