"""Result lists ordered by (-score, gallery index): the exact score, running lists, merging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cir_core.schema import CirError
from cir_core.search import kernels
from cir_core.search.blocks import Block


@dataclass(frozen=True, eq=False, slots=True)
class TopK:
    """scores float32[Q, k], best first, -inf past the end; indices int64[Q, k] in the gallery, -1 past the
    end."""

    scores: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        """Check shapes and dtypes."""
        if self.scores.ndim != 2 or self.scores.shape != self.indices.shape:
            raise CirError(f"TopK: scores {tuple(self.scores.shape)}, indices {tuple(self.indices.shape)}: not [Q, k]")
        if self.scores.dtype != torch.float32 or self.indices.dtype != torch.int64:
            raise CirError(
                f"TopK: needs float32 scores and int64 indices, got {self.scores.dtype}, {self.indices.dtype}"
            )


def merge_top_k(parts: Sequence[TopK], k: int) -> TopK:
    """The top k of several searches over different parts of one gallery, each with indices into the whole
    gallery.

    Equals the search over everything, bit for bit, when every part was searched with at least this k.
    Raises CirError for no parts, different Q, k < 1, or an image found by two parts (a part given twice).
    """
    if not parts or k < 1:
        raise CirError(f"merge_top_k: needs at least one part and k >= 1, got {len(parts)} parts and k = {k}")
    if len({len(part.scores) for part in parts}) != 1:
        raise CirError(
            f"merge_top_k: parts answer different numbers of queries: {[len(part.scores) for part in parts]}"
        )
    device = parts[0].scores.device
    scores, indices = sort_lists(
        torch.cat([part.scores.to(device) for part in parts], dim=1),
        torch.cat([part.indices.to(device) for part in parts], dim=1),
    )
    by_index = indices.sort(dim=1).values
    twice = by_index[:, 1:][(by_index[:, 1:] == by_index[:, :-1]) & (by_index[:, 1:] >= 0)]
    if len(twice):
        raise CirError(f"merge_top_k: gallery index {int(twice[0])} is in two parts; was a part given twice?")
    missing = max(k - scores.shape[1], 0)
    scores = torch.nn.functional.pad(scores[:, :k], (0, missing), value=-torch.inf)
    return TopK(scores, torch.nn.functional.pad(indices[:, :k], (0, missing), value=-1))


def sort_lists(scores: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Order every row of [L, m] by (-score, index): two stable sorts, the later key first."""
    by_index = indices.argsort(dim=1, stable=True)
    by_score = scores.gather(1, by_index).argsort(dim=1, descending=True, stable=True)
    order = by_index.gather(1, by_score)
    return scores.gather(1, order), indices.gather(1, order)


def pair_dots(left_QD: Tensor, right_GD: Block, left: Tensor, right: Tensor) -> Tensor:
    """float64[P]: inner products of rows left[p] and right[p], the products added in an order that D alone
    fixes.

    The product of two float32 is exact in float64. Sums halve the width again and again by elementwise
    additions, which IEEE 754 defines to the last bit on every device; a library's sum or matrix product may
    add in any order. The compiled loops do the same additions.
    left_QD: float32; right_GD: float32, or any supported dtype where the compiled loops are there.
    """
    if kernels.is_compiled() and left_QD.device.type == "cpu":
        return kernels.pair_dots(left_QD, kernels.Rows(right_GD), left, right)
    return torch_pair_dots(left_QD, torch.as_tensor(right_GD), left, right)


def torch_pair_dots(left_QD: Tensor, right_GD: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`pair_dots` in torch operations, on any device."""
    out = torch.empty(len(left), dtype=torch.float64, device=left_QD.device)
    elements = 2**17 if left_QD.device.type == "cpu" else 2**24  # 1 MiB of float64 stays in a CPU core's cache
    step = max(1, elements // left_QD.shape[1])
    for start in range(0, len(left), step):
        part = slice(start, start + step)
        products = left_QD[left[part]].double().mul_(right_GD[right[part]])
        width = products.shape[1]
        while width > 1:
            half = (width + 1) // 2
            products[:, : width - half] += products[:, half:width]
            width = half
        out[part] = products[:, 0]
    return out


class BestLists:
    """The best k of everything offered so far, for L lists."""

    def __init__(self, num_lists: int, k: int, device: torch.device) -> None:
        self.k = k
        self.scores = torch.full((num_lists, k), -torch.inf, device=device)
        self.indices = torch.full((num_lists, k), -1, dtype=torch.int64, device=device)

    def offer(self, lists: Tensor, scores: Tensor, indices: Tensor) -> None:
        """Take P candidates (list number, exact score, gallery index), ascending by list number."""
        possible = scores >= self.scores[lists, -1]
        lists, scores, indices = lists[possible], scores[possible], indices[possible]
        if len(lists) == 0:
            return
        touched, slot, counts = torch.unique_consecutive(lists, return_inverse=True, return_counts=True)
        place = torch.arange(len(lists), device=lists.device) - (counts.cumsum(0) - counts)[slot]
        # One list may have thousands of candidates where others have one: rounds keep the padded table small.
        width = min(int(counts.max()), max(self.k, 256))
        for first in range(0, int(counts.max()), width):
            now = (place >= first) & (place < first + width)
            self._merge(touched, slot[now], place[now] - first, scores[now], indices[now], width)

    def _merge(self, touched: Tensor, slot: Tensor, place: Tensor, scores: Tensor, indices: Tensor, width: int) -> None:
        more_scores = torch.full((len(touched), width), -torch.inf, device=scores.device)
        more_indices = torch.full((len(touched), width), -1, dtype=torch.int64, device=scores.device)
        more_scores[slot, place] = scores
        more_indices[slot, place] = indices
        both = sort_lists(
            torch.cat([self.scores[touched], more_scores], dim=1),
            torch.cat([self.indices[touched], more_indices], dim=1),
        )
        self.scores[touched], self.indices[touched] = both[0][:, : self.k], both[1][:, : self.k]

    def split(self, num_keys: int) -> list[TopK]:
        """One TopK a key; list number = key * Q + query."""
        pairs = zip(self.scores.chunk(num_keys), self.indices.chunk(num_keys), strict=True)
        return [TopK(scores.clone(), indices.clone()) for scores, indices in pairs]
