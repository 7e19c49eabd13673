"""The scan on a GPU with matrix units for bfloat16: products of whole tiles, one pass over each for its group maxima.

No CUDA device has run this so far: all of it is torch operations that run on any device, and the tests run them on the
CPU. The speeds below are arithmetic, not measurements. device_bounds.py derives the error bound E that is used here.

Selecting. Column c of group j is c * groups + j. Maxima of a group bound the scores of all its columns under every
weighting; where they reach the k-th best score so far less E, its columns are looked at. First floors come from the rows
themselves: if t is the k-th largest of the groups' largest lower bounds, k rows have S >= o + t - E, and what is below
t - 2 E cannot enter. Pieces of tiles are at first no longer than what was seen before, so that some k rows per query pass,
not thousands. What passes is gathered with its rows and scored by the definition when there is enough of it.

What to expect (an estimate for an H200: 800 TFLOP/s in bfloat16, 4.8 TB/s; 2048 queries, 2^19 rows, D = 512). The
product is 1.10 TFLOP, 1.37 ms. Stored in bfloat16 it is 2 GiB: one pass over it, 0.45 to 0.5 ms. Group maxima are 64 MiB:
comparing and listing them, some 0.05 ms. Two or three waits for the device and some twenty launches between the last of
them and the next product, some 0.1 ms. So 1.37 of 2.0 ms, about 70 % of the peak; with float32 products, twice the bytes,
55 %. At D = 1024 these are 81 % and 70 %: float32 from there on. 21 weightings, half as many rows a tile: two products
1.37 ms, one pass over both 0.48 ms, 0.5 ms for the table of opened_by_some and its passes over maxima of 16: 2.4 times one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cir_core.search.device_bounds import bound_terms, offsets_of, opened_by_some, rounding_of, weighted
from cir_core.search.device_candidates import Candidates
from cir_core.search.device_tiles import DeviceTile
from cir_core.search.queries import LinearQueries
from cir_core.search.top_k import BestLists, TopK

_LOWEST = torch.finfo(torch.float32).min
_QUERIES = 2048  # of one product
_SEED_ROWS = 2**15  # of the first piece, which finds its floors itself
_CELLS = 2**22  # scores of opened groups looked at together: 16 MiB in float32


def product_dtype(device: torch.device, dim: int) -> torch.dtype:
    """What products are stored in. float32 narrows the bound and costs another pass's time: see the module's estimate."""
    return torch.float32 if device.type == "cuda" and dim >= 1024 else torch.bfloat16


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right.T of bfloat16 matrices, summed in float32, stored as `out` is: bfloat16 or float32."""
    if out.dtype == torch.bfloat16:
        torch.mm(left, right.T, out=out)
    elif left.device.type == "cuda":
        torch.mm(left, right.T, out_dtype=torch.float32, out=out)
    else:  # elsewhere torch has no such product
        torch.mm(left.float(), right.float().T, out=out)


def _memory(device: torch.device) -> int:
    """Bytes that the scan may take for a while, beside the gallery: 4 GiB of an H200's 139."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 32
    return 2**26


@dataclass(frozen=True, eq=False, slots=True)
class _Batch:
    """q queries of one product, R vectors each.

    first: number of the first. vectors: bfloat16 [q, D] each. weights: float32 [K, R, q]. terms: float64 [3, K, q],
    what E has of R, G' and G.
    """

    first: int
    queries: LinearQueries
    vectors: list[Tensor]
    weights: Tensor
    terms: Tensor


class DeviceScan:
    """One pass over a gallery, tile by tile, into k best a list (list number = key * Q + query)."""

    def __init__(self, queries: LinearQueries, k: int, excluded: Tensor | None) -> None:
        self.queries, self.device = queries, queries.device
        self.direct = queries.num_keys == 1  # one product with the composed query is cheaper than one a part
        self.group = 32 if self.direct else 16
        self.dtype = product_dtype(queries.device, queries.dim)
        self.rho = rounding_of(self.dtype)
        self.any_negative = not self.direct and bool((queries.weights < 0).any())
        # So many rows of a query have k that are not excluded among them.
        self.rank = k + (0 if excluded is None else excluded.shape[1])
        self.best = BestLists(queries.num_keys * queries.num_queries, k, queries.device)
        memory = _memory(queries.device)
        self.candidates = Candidates(queries, self.best, excluded, memory=memory // 8)
        step = max(1, min(queries.num_queries, _QUERIES))
        num_products = 1 if self.direct else len(queries.parts)
        rows = min(memory // (2 * self.dtype.itemsize * num_products * step), memory // (8 * queries.dim))
        self.tile_rows = max(256, rows // self.group * self.group)
        self.num_seen = 0
        self.batches = [self._batch(first, step) for first in range(0, queries.num_queries, step)]

    def _batch(self, first: int, step: int) -> _Batch:
        queries = self.queries.part(slice(first, first + step))
        if self.direct:
            parts = zip(queries.weights[0], queries.parts, strict=True)
            vectors = [torch.stack([weight[:, None] * part.double() for weight, part in parts]).sum(0).float()]
            weights = torch.ones(1, 1, queries.num_queries, dtype=torch.float64, device=self.device)
        else:
            vectors, weights = list(queries.parts), queries.weights
        scanned = [vector.to(torch.bfloat16) for vector in vectors]
        return _Batch(first, queries, scanned, weights.float(), bound_terms(queries, vectors, scanned, weights))

    def add(self, tile: DeviceTile) -> None:
        """Scan one tile of at most `tile_rows` rows for all queries and weightings."""
        tile.check()
        start = 0
        while start < len(tile.rows):
            early = self.num_seen < self.tile_rows  # floors still rise much from piece to piece
            stop = min(len(tile.rows), start + max(_SEED_ROWS, self.num_seen))
            piece = tile.part(start, stop)
            for batch in self.batches:
                self._scan(batch, piece)
            self.num_seen += stop - start
            self.candidates.settle(wait=not early)
            start = stop

    def results(self) -> list[TopK]:
        """Return one TopK a key."""
        with torch.no_grad():
            self.candidates.settle(wait=False)
        return self.best.split(self.queries.num_keys)

    def _scan(self, batch: _Batch, piece: DeviceTile) -> None:
        grouped = self._products(batch, piece)
        num_rows = len(piece.rows)
        errors = sum(term * size for term, size in zip(batch.terms, piece.stats, strict=True))
        worst = self.best.scores.view(self.queries.num_keys, self.queries.num_queries, self.best.k)[:, :, -1]
        floors = worst[:, batch.first : batch.first + batch.queries.num_queries].double()
        floors = floors - offsets_of(batch.queries, piece.centre) - errors
        raised = self.num_seen < self.rank
        if raised:
            floors = torch.maximum(floors, self._own_floors(batch, grouped, num_rows) - 2 * errors)
        limits = self._limits(floors)
        query, group = self._open_groups(batch, grouped, limits)
        if len(query) * 4 > grouped[0, :, 0].numel() and not raised:
            limits = self._limits(torch.maximum(floors, self._own_floors(batch, grouped, num_rows) - 2 * errors))
            query, group = self._open_groups(batch, grouped, limits)
        step = max(1, _CELLS // (self.group * self.queries.num_keys))
        for start in range(0, len(query), step):
            some = slice(start, start + step)
            self._collect(batch, piece, grouped, limits, query[some], group[some])

    def _products(self, batch: _Batch, piece: DeviceTile) -> Tensor:
        """[R, q, columns of a group, groups] of the stored products."""
        num_rows = len(piece.rows)
        groups = -(-num_rows // self.group)
        shape = (len(batch.vectors), batch.queries.num_queries, groups * self.group)
        products = torch.empty(shape, dtype=self.dtype, device=self.device)
        for vectors, table in zip(batch.vectors, products, strict=True):
            multiply(vectors, piece.scanned, table[:, :num_rows])
        products[:, :, num_rows:] = products[
            :, :, :1
        ]  # what only pads: any finite number, at worst a group is opened for it
        return products.view(*shape[:2], self.group, groups)

    def _stretched(self, highest: Tensor, lowest: Tensor | None) -> tuple[Tensor, Tensor]:
        """float32 bounds of the products from those of the stored ones: from above, and from below for negative weights."""
        high = highest.float()
        low = high if lowest is None else lowest.float()
        return torch.add(high, high.abs(), alpha=self.rho), low if lowest is None else low - self.rho * low.abs()

    def _limits(self, floors: Tensor) -> Tensor:
        """float32[K, q]: an upper bound below it cannot enter a list; of stored products themselves where direct."""
        if self.direct:  # x + rho |x| >= floor is x >= floor / (1 +- rho): one comparison in place of three steps
            floors = torch.where(floors >= 0, floors / (1 + self.rho), floors / (1 - self.rho))
        below = torch.nextafter(floors.float(), torch.full((), -torch.inf, dtype=torch.float32, device=self.device))
        return below.clamp(min=_LOWEST)

    def _open_groups(self, batch: _Batch, grouped: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """(query, group) that some weighting cannot rule out, ascending by query."""
        highest = grouped.amax(2)
        if self.direct:
            query, group = torch.nonzero(highest[0] >= limits[0, :, None], as_tuple=True)
            return query, group
        high, low = self._stretched(highest, grouped.amin(2) if self.any_negative else None)
        if len(high) == 2 and not self.any_negative:
            opened = opened_by_some(batch.weights, high, limits)
        else:
            opened = torch.zeros(highest.shape[1:], dtype=torch.bool, device=self.device)
            for weights, limit in zip(batch.weights, limits, strict=True):
                opened |= weighted(weights, high, low, any_negative=self.any_negative) >= limit[:, None]
        query, group = torch.nonzero(opened, as_tuple=True)
        return query, group

    def _own_floors(self, batch: _Batch, grouped: Tensor, num_rows: int) -> Tensor:
        """float64[K, q]: t of the module docstring, from parts of groups where there are too few groups; -inf for none."""
        groups = grouped.shape[3]
        if num_rows < self.rank:
            return torch.full(
                (len(batch.weights), grouped.shape[1]), -torch.inf, dtype=torch.float64, device=self.device
            )
        length = max(1, self.group // -(-self.rank // groups))  # columns of a group that share a maximum
        floors = []
        for weights in batch.weights:
            maxima: list[Tensor] = []
            for column in range(self.group):
                high, low = self._stretched(grouped[:, :, column], grouped[:, :, column])
                lower = weighted(weights, low, high, any_negative=True)
                lower[:, max(0, num_rows - column * groups) :] = -torch.inf  # a row that pads is counted where it is
                if column % length:
                    torch.maximum(maxima[-1], lower, out=maxima[-1])
                else:
                    maxima.append(lower)
            floors.append(torch.topk(torch.cat(maxima, dim=1), self.rank, dim=1).values[:, -1])
        return torch.stack(floors).double()

    def _collect(
        self, batch: _Batch, piece: DeviceTile, grouped: Tensor, limits: Tensor, query: Tensor, group: Tensor
    ) -> None:
        """Hand on what the bound cannot rule out in the groups that were opened."""
        products = grouped[:, query, :, group].movedim(0, 1)  # [R, m, columns of a group]
        column = torch.arange(self.group, device=self.device) * grouped.shape[3] + group[:, None]
        if self.direct:
            scores = products
        else:
            bounds = self._stretched(products, products if self.any_negative else None)
            scores = weighted(batch.weights[:, :, query], *bounds, any_negative=self.any_negative)
        wanted = (scores >= limits[:, query, None]) & (column < len(piece.rows))
        slot, place = torch.nonzero(wanted.any(0), as_tuple=True)
        keys = wanted[:, slot, place]
        self.candidates.add(piece, query[slot] + batch.first, column[slot, place], keys)
