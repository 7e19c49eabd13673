"""The scan: float32 products over a tile, a bound on their error, exact scores for what the bound leaves.

Error bound. A float32 inner product of D terms, added in any order, with or without fused multiply-add,
differs from the true value by at most gamma_D |x| |g|, gamma_n = n u / (1 - n u), u = 2^-24 (Higham,
"Accuracy and Stability of Numerical Algorithms", section 3.1). Rounding of the weights, the weighted sum and
the exact score add a few u. So with gamma = 1.01 gamma_(D+8), the scanned score s and the exact score S of
one pair obey

    |s - S| <= E = gamma * sum over parts (|weight| |x|) * (largest |g| of the tile)

If K is the exact k-th best score so far, a row with s < K - E cannot enter the list; if t is the k-th best
scanned score of a tile, k rows have S >= t - E, so a row with s < t - 2E cannot either. Group maxima of the
two products bound the scores of a whole group of columns for every weighting at once: most groups fall to one
comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from cir_core.search.blocks import RowBlock, Tile, indices_of
from cir_core.search.device_tiles import DeviceTile
from cir_core.search.queries import TINY, LinearQueries
from cir_core.search.top_k import BestLists, TopK, pair_dots

_GROUP = 16  # columns a group maximum stands for: the reduction is 16 times smaller, and few groups survive
_MAX_PAIRS = 2**20  # candidates held before they are scored: about 30 MiB of indices
_LOWEST = torch.finfo(torch.float32).min


_precision_lock = Lock()
_precision_before: list[Any] = []  # what the first of the searches that run now found
_num_searches = 0


@contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and true float32 products and sums: TF32 and bfloat16 would break the error bounds.

    The precision is one of the whole process: of several searches at once the last to end puts it back.
    """
    global _num_searches, _precision_before
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    settings: tuple[tuple[Any, str, Any], ...] = (
        (cuda, "fp32_precision", "ieee"),
        (mkldnn, "fp32_precision", "ieee"),
        # A long sum that is split among processors is put together in float32.
        (cuda, "allow_bf16_reduced_precision_reduction", False),
    )
    with _precision_lock:
        if _num_searches == 0:
            _precision_before = [_setting(backend, name) for backend, name, _ in settings]
        _num_searches += 1
        for backend, name, value in settings:
            setattr(backend, name, value)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _precision_lock:
            _num_searches -= 1
            if _num_searches == 0:
                for (backend, name, _), before in zip(settings, _precision_before, strict=True):
                    setattr(backend, name, before)


def _setting(backend: Any, name: str) -> Any:
    """Return the value to set to have a setting as it is; newer versions of torch set whether sums are split with it."""
    value, split = getattr(backend, name), getattr(backend, f"{name}_split_k", None)
    return value if split is None else (value, split)


class Scan:
    """One pass over a gallery, tile by tile, into k best a list (list number = key * Q + query)."""

    def __init__(self, queries: LinearQueries, k: int, excluded: Tensor | None) -> None:
        self.queries, self.excluded = queries, excluded
        self.best = BestLists(queries.num_keys * queries.num_queries, k, queries.device)
        self.error_scale = queries.error_scale()
        self.weights32 = queries.weights.float()
        self.any_negative = bool((queries.weights < 0).any())
        on_cpu = queries.device.type == "cpu"
        self.query_step = max(1, min(queries.num_queries, 256 if on_cpu else 2048))
        cells = 2**21 if on_cpu else 2**26
        rows = min(max(cells // self.query_step, 4096), max(2**24 // queries.dim, 4096), 2**16)
        self.tile_rows = rows // _GROUP * _GROUP
        shape = (len(queries.parts), self.query_step, self.tile_rows)
        self.products = torch.zeros(shape, device=queries.device)

    def add(self, tile: Tile) -> None:
        """Scan one tile of at most `tile_rows` rows for all queries and weightings."""
        codes = None if self.excluded is None else find_listed(self.excluded, tile.indices)
        for start in range(0, self.queries.num_queries, self.query_step):
            queries = slice(start, min(start + self.query_step, self.queries.num_queries))
            self._scan_queries(tile, queries, None if codes is None else _codes_of(codes, queries, len(tile.rows)))

    def _scan_queries(self, tile: Tile, queries: slice, excluded: Tensor | None) -> None:
        num_columns = len(tile.rows)
        num_groups = -(-num_columns // _GROUP)
        products = self.products[:, : queries.stop - queries.start, : num_groups * _GROUP]
        for part, rows in enumerate(self.queries.parts):
            torch.mm(rows[queries], tile.rows.T, out=products[part, :, :num_columns])
        # Column c of group j is c * num_groups + j: maxima over a strided axis vectorise, over a short last
        # axis they do not.
        grouped = products.view(len(products), -1, _GROUP, num_groups)
        highest = grouped.amax(2)
        lowest = grouped.amin(2) if self.any_negative else highest
        found: list[tuple[int, Tensor, Tensor]] = []
        for key in range(self.queries.num_keys):
            weights = self.weights32[key, :, queries]
            errors = self.error_scale[key, queries] * (tile.max_norm + TINY)
            floor = self._floor(key, queries, errors)
            bound = (weights.clamp(min=0)[:, :, None] * highest).sum(0)
            if self.any_negative:
                bound += (weights.clamp(max=0)[:, :, None] * lowest).sum(0)
            query, group = torch.nonzero(bound >= floor[:, None], as_tuple=True)
            if len(query) * 4 > bound.numel():
                query, column = self._dense(products[:, :, :num_columns], weights, floor, errors, excluded)
            else:
                query, column = _open_groups(grouped, weights, floor, query, group)
                query, column = _drop(query, column, num_columns, excluded)
            found.append((key, query, column))
            if sum(len(pair[1]) for pair in found) > _MAX_PAIRS or key == self.queries.num_keys - 1:
                offer_pairs(self.queries, tile, found, queries.start, self.best)
                found = []

    def results(self) -> list[TopK]:
        """Return one TopK a key."""
        return self.best.split(self.queries.num_keys)

    def _floor(self, key: int, queries: slice, errors: Tensor) -> Tensor:
        """float32[q]: scanned scores below it cannot enter the list. Finite, so that -inf never passes."""
        first = key * self.queries.num_queries
        worst = self.best.scores[first + queries.start : first + queries.stop, -1].double()
        return _round_down(worst - errors).clamp(min=_LOWEST)

    def _dense(
        self, products: Tensor, weights: Tensor, floor: Tensor, errors: Tensor, excluded: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Candidates where much passes the floor: the tile's own k-th best score raises it first."""
        scores = (weights[:, :, None] * products).sum(0)
        if excluded is not None:
            scores.view(-1)[excluded] = -torch.inf
        if self.best.k <= scores.shape[1]:
            kth = torch.topk(scores, self.best.k, dim=1).values[:, -1].double()
            floor = torch.maximum(floor, _round_down(kth - 2 * errors))
        query, column = torch.nonzero(scores >= floor[:, None], as_tuple=True)
        return query, column


def _open_groups(
    grouped: Tensor, weights: Tensor, floor: Tensor, query: Tensor, group: Tensor
) -> tuple[Tensor, Tensor]:
    """(query, column) pairs at or above the floor in the groups that passed; grouped: [P, q, _GROUP, groups]."""
    scores = (weights[:, query][:, :, None] * grouped[:, query, :, group].movedim(0, 1)).sum(0)
    passed, place = torch.nonzero(scores >= floor[query][:, None], as_tuple=True)
    return query[passed], place * grouped.shape[3] + group[passed]


def _drop(query: Tensor, column: Tensor, num_columns: int, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    """Without columns that only pad the last group, and without excluded pairs."""
    keep = column < num_columns
    if excluded is not None:
        keep &= ~torch.isin(query * num_columns + column, excluded)
    return query[keep], column[keep]


def _round_down(x: Tensor) -> Tensor:
    """float64 to a float32 that is not above it."""
    return torch.nextafter(x.float(), torch.tensor(-torch.inf, device=x.device))


def offer_pairs(
    queries: LinearQueries,
    tile: Tile | RowBlock | DeviceTile,
    found: Sequence[tuple[int, Tensor, Tensor]],
    first_query: int,
    best: BestLists,
) -> None:
    """Score (key, query, column) candidates by the definition and offer them.

    A pair wanted by several keys is computed once.
    """
    num_columns = len(tile.rows)
    codes = torch.cat([query * num_columns + column for _, query, column in found])
    if len(codes) == 0:
        return
    distinct, place = torch.unique(codes, return_inverse=True)
    left, right = distinct // num_columns + first_query, distinct % num_columns
    dots = [pair_dots(part, tile.rows, left, right)[place] for part in queries.parts]
    lists, scores = [], []
    start = 0
    for key, query, _ in found:
        part = slice(start, start + len(query))
        lists.append(key * queries.num_queries + first_query + query)
        scores.append(queries.exact_scores(key, first_query + query, [dot[part] for dot in dots]))
        start = part.stop
    columns = torch.cat([column for _, _, column in found])
    best.offer(torch.cat(lists), torch.cat(scores), indices_of(tile)[columns])


def rank_listed(queries: LinearQueries, tile: Tile | RowBlock | DeviceTile, listed: Tensor, best: BestLists) -> None:
    """Offer every query the rows of this tile that its list [Q, m] names."""
    query, column = find_listed(listed, indices_of(tile))
    step = _MAX_PAIRS // queries.num_keys + 1
    for pairs in (slice(start, start + step) for start in range(0, len(query), step)):
        found = [(key, query[pairs], column[pairs]) for key in range(queries.num_keys)]
        offer_pairs(queries, tile, found, 0, best)


def find_listed(listed: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(query, column) with indices[column] in listed[query], ascending by query, each pair once."""
    ordered, column = indices.sort()
    place = torch.searchsorted(ordered, listed).clamp(max=len(ordered) - 1)
    query, slot = torch.nonzero(ordered[place] == listed, as_tuple=True)
    return query, column[place[query, slot]]


def _codes_of(pairs: tuple[Tensor, Tensor], queries: slice, num_columns: int) -> Tensor | None:
    """The (query, column) pairs of a range of queries, as positions in its score table; None if there are
    none."""
    query, column = pairs
    inside = (query >= queries.start) & (query < queries.stop)
    codes = (query[inside] - queries.start) * num_columns + column[inside]
    return codes if len(codes) else None
