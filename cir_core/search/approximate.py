"""Approximate search: FAISS proposes candidates, the exact definition of a score orders them.

An index over a shard looks at a part of its rows (`depth`: inverted lists or graph candidates); the rows it proposes are
scored and ordered as exact search does, (-score, gallery index), from the very same float32 rows. So a list differs from
the exact one only by images that were not looked at, lists of shards are merged by `merge_top_k`, and an ivf index that
looks into all its lists gives exact search's result, bit for bit: FAISS adds in float32 in an order of its own, so it is
asked again for more as long as a row it left out could still, within the error bound of float32 products, belong in the list.

What was not found is what has to be known: `recall_of_exact` compares with exact search on a sample of the same queries,
and no job of ours reports approximate results without it.

    index = ShardIndex.build(blocks, IndexSettings.derived("ivf", num_rows), num_rows=num_rows, dim=dim)
    found = approximate_top_k(index, image, text, {0.8: query_weights("slerp", image, text, 0.8)}, 50, depth=16)

Shapes: Q queries, D embedding dimensions, k results, n rows of the shard.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cir_core.metrics import Interval
from cir_core.schema import CirError
from cir_core.search import subset_top_k
from cir_core.search.faiss_index import Rows, ShardIndex, one_thread
from cir_core.search.index_files import IndexSettings, in_range
from cir_core.search.queries import IndexLists
from cir_core.search.top_k import TopK

__all__ = [
    "IndexSettings",
    "ShardIndex",
    "approximate_top_k",
    "checked_depth",
    "default_depth",
    "recall_of_exact",
    "wilson_interval",
]

Key = TypeVar("Key", bound=Hashable)
Numbers = npt.NDArray[np.int64]
_QUERIES_AT_ONCE = 256  # times k rows of D float32 are held: 30 MB for k = 60, D = 512
_TINY = 1e-15  # stands in for what underflow takes from a norm


def default_depth(settings: IndexSettings, k: int) -> int:
    """Return how deep a search for k results looks: an eighth of the lists, at least 16; or max(128, 2k) candidates."""
    if settings.kind == "ivf":
        return min(settings.nlist, max(16, -(-settings.nlist // 8)))
    return max(128, 2 * k)


def checked_depth(settings: IndexSettings, depth: int, k: int) -> int:
    """Return `depth`; CirError for lists that an index does not have, or fewer graph candidates than results."""
    if settings.kind == "ivf":
        return in_range("nprobe", depth, 1, settings.nlist, "at most nlist")
    return in_range("ef_search", depth, k, 2**20, "at least k")


def approximate_top_k(
    index: ShardIndex,
    image_queries: Tensor,
    text_queries: Tensor,
    weights: Mapping[Key, tuple[Tensor, Tensor]],
    k: int,
    *,
    depth: int,
    exclude: IndexLists | None = None,
) -> dict[Key, TopK]:
    """The k best rows that the index finds, for every named weighting; a weighting's result depends on no other.

    image_queries, text_queries, weights, exclude and results as in `weighted_top_k`; depth as in `ShardIndex.search`, where
    a list that would be shorter than k looks deeper. So a list is short only if the shard is, or if no link of its graph
    leads to the rest. FAISS works with one thread. Raises CirError as `weighted_top_k` does, and for a depth or k below 1.
    """
    in_range("k", k, 1, 2**31)
    in_range("depth", depth, 1, 2**31)
    image, text = (torch.as_tensor(rows).detach().cpu() for rows in (image_queries, text_queries))
    if image.shape != text.shape or image.ndim != 2 or image.shape[1] != index.dim:
        raise CirError(f"queries must be two [Q, {index.dim}], got {list(image.shape)} and {list(text.shape)}")
    out = _excluded(exclude, len(image))
    found: dict[Key, list[TopK]] = {key: [] for key in weights}
    with one_thread():
        for start in range(0, len(image), _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            for key, pair in weights.items():
                chunk = _Chunk(index, image[part], text[part], [weight.cpu()[part] for weight in pair], k, out[part])
                found[key].append(chunk.search(depth))
    return {key: _concatenated(parts, k) for key, parts in found.items()}


class _Chunk:
    """Some queries under one weighting, and their lists so far. excluded: gallery indices, int64[Q, m], -1 is none."""

    def __init__(
        self, index: ShardIndex, image: Tensor, text: Tensor, pair: Sequence[Tensor], k: int, excluded: Numbers
    ) -> None:
        self.index, self.image, self.text, self.k, self.excluded = index, image, text, k, excluded
        self.pair = [weight.double() for weight in pair]
        parts = [weight[:, None] * rows.double() for weight, rows in zip(self.pair, (image, text), strict=True)]
        self.composed: Rows = np.ascontiguousarray((parts[0] + parts[1]).float().numpy())
        self.margin = self._margin(parts)
        self.scores = torch.full((len(image), k), -torch.inf)
        self.indices = torch.full((len(image), k), -1, dtype=torch.int64)

    def _margin(self, parts: Sequence[Tensor]) -> npt.NDArray[np.float64]:
        """float64[Q]: how far FAISS's score of a row and the exact one can lie apart: see scan.py."""
        n = (self.index.dim + 8) * 2.0**-24
        composed = np.linalg.norm(self.composed.astype(np.float64), axis=1) + _TINY
        whole = sum(part.norm(dim=1).numpy() for part in parts)  # large weights may cancel; float64 rounds that
        error = 1.01 * n / (1 - n) * composed + (self.index.dim + 8) * 2.0**-52 * whole
        margin: npt.NDArray[np.float64] = error * (self.index.max_norm * 1.01 + _TINY)
        return margin

    def search(self, depth: int) -> TopK:
        """Ask FAISS, and again for more and deeper where a list is short or a row left out might belong in it."""
        size, deepest = self.index.num_rows, self._deepest()
        wanted = min(size, self.k + self.excluded.shape[1] + max(8, self.k // 8))
        depth, open_queries = min(depth, deepest), np.arange(len(self.image))
        while len(open_queries):
            scores, numbers = self.index.search(self.composed[open_queries], wanted, self._at_least(depth, wanted))
            self._rank(open_queries, numbers)
            full = self.indices[open_queries, -1].numpy() >= 0
            worst = self.scores[open_queries, -1].numpy().astype(np.float64)
            nothing_more = (numbers[:, -1] < 0) | (wanted == size)
            if self.index.settings.kind == "ivf":
                ruled_out = scores[:, -1] + self.margin[open_queries] < worst
                done = full & (nothing_more | ruled_out) | nothing_more & (depth == deepest)
            else:
                done = full | (nothing_more & (depth == deepest))
            open_queries = open_queries[~done]
            wanted, depth = min(size, 2 * wanted), min(deepest, 2 * depth)
        return TopK(self.scores, self.indices)

    def _deepest(self) -> int:
        settings = self.index.settings
        return settings.nlist if settings.kind == "ivf" else max(self.index.num_rows, 1)

    def _at_least(self, depth: int, wanted: int) -> int:
        """A graph search holds at least as many candidates as it returns."""
        return depth if self.index.settings.kind == "ivf" else max(depth, wanted)

    def _rank(self, queries: Numbers, numbers: Numbers) -> None:
        """Order FAISS's row numbers [q, c] by the definition, without what is excluded, and keep the best k."""
        places = np.where(numbers >= 0, self.index.row_indices[numbers], -1)
        out = (places[:, :, None] == self.excluded[queries][:, None, :]).any(2) | (numbers < 0)
        if out.all():
            return
        gallery_indices, first, place = np.unique(places[~out], return_index=True, return_inverse=True)
        listed = np.full(numbers.shape, -1, np.int64)  # places among the distinct, so ties go by gallery index
        listed[~out] = place
        rows = torch.from_numpy(self.index.rows(numbers[~out][first]))
        pair = (self.pair[0][queries], self.pair[1][queries])
        top = subset_top_k(self.image[queries], self.text[queries], rows, {0: pair}, torch.from_numpy(listed), self.k)[
            0
        ]
        indices = torch.from_numpy(gallery_indices)[top.indices.clamp(min=0)]
        self.scores[queries] = top.scores
        self.indices[queries] = torch.where(top.indices >= 0, indices, -1)


def _excluded(exclude: Any, num_queries: int) -> Numbers:
    """Gallery indices kept out of each query's list as int64[Q, m], m >= 1, -1 is none."""
    if exclude is None:
        return np.full((num_queries, 1), -1, np.int64)
    lists = [np.atleast_1d(np.asarray(one, np.int64)) for one in exclude]
    if len(lists) != num_queries:
        raise CirError(f"exclude must have gallery indices for each of the {num_queries} queries, it has {len(lists)}")
    table = np.full((num_queries, max([1, *map(len, lists)])), -1, np.int64)
    for row, one in zip(table, lists, strict=True):
        row[: len(one)] = one
    return table


def _concatenated(parts: Sequence[TopK], k: int) -> TopK:
    if not parts:
        return TopK(torch.empty(0, k), torch.empty(0, k, dtype=torch.int64))
    return TopK(torch.cat([part.scores for part in parts]), torch.cat([part.indices for part in parts]))


def recall_of_exact(found: Tensor, exact: Tensor, k: int) -> npt.NDArray[np.float64]:
    """Return the share of each exact list's first k that is among the first k found, float64[Q].

    found, exact: gallery indices int64[Q, at least k], -1 past the end. An exact list that is empty has recall 1: nothing
    can be missing.

    >>> recall_of_exact(torch.tensor([[4, 2, 7]]), torch.tensor([[4, 7, 9]]), 3)
    array([0.66666667])
    """
    if found.shape[0] != exact.shape[0] or min(found.shape[1], exact.shape[1]) < k:
        raise CirError(f"recall: found {list(found.shape)} and exact {list(exact.shape)} must be [Q, {k}] or longer")
    pairs = zip(found[:, :k].numpy(), exact[:, :k].numpy(), strict=True)
    return np.array([np.isin(best[best >= 0], mine).mean() if best.max() >= 0 else 1.0 for mine, best in pairs])


def wilson_interval(per_query: npt.ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Return the mean of values in [0, 1] and Wilson's score interval (Wilson 1927) for as many yes-or-no outcomes.

    A value between 0 and 1 varies less than a yes or no of the same mean, so the interval is on the safe side; and where
    every value is 1 it does not shrink to a point, as a bootstrap interval does.

    >>> wilson_interval([1.0] * 200)
    Interval(mean=1.0, low=0.9811546736227333, high=1.0)
    """
    values = np.asarray(per_query, np.float64)
    if values.ndim != 1 or not values.size or not ((values >= 0) & (values <= 1)).all() or not 0 < confidence < 1:
        raise CirError("wilson_interval: needs values in [0, 1], at least one, and a confidence between 0 and 1")
    num, mean, z = values.size, float(values.mean()), NormalDist().inv_cdf((1 + confidence) / 2)
    centre, scale = mean + z * z / (2 * num), 1 + z * z / num
    half = z * ((mean * (1 - mean) + z * z / (4 * num)) / num) ** 0.5
    return Interval(mean, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))
