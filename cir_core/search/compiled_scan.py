"""The scan on a CPU with compiled inner loops: products of one matrix call a tile, everything else in kernels.c.

For every tile of rows and batch of queries: cast the rows (bfloat16 where the processor multiplies it fast, else
float32) less a centre, multiply, and let the loops keep every row whose upper bound reaches the k-th best lower bound
so far. What is left at the end of a block is scored by the definition. scan.py explains the bounds; here E has three
terms, of the largest residual of the cast |g - c - g'|, the largest |g'| and the largest |g| of the tile:

    |v . (g - c) - s| <= |v| |g - c - g'| + (|v - v'| + gamma |v'|) |g'| + rounding of the exact score

and a product that is stored in bfloat16, of 8 significant bits, adds at most 2^-8 of itself. Float64 sums round too:
where the parts of a composed query cancel, v and v . c are off by 2^-53 of what cancelled. Subtracting a centre (a mean
of rows) changes every score of a query by the same number and makes what is rounded shorter: embeddings of one modality
lie in a cone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cir_core.schema import CirError
from cir_core.search import kernels
from cir_core.search.blocks import MAX_NORM, RowBlock, not_finite
from cir_core.search.products import multiply, right_operand, scan_dtype
from cir_core.search.queries import TINY, TINY_WEIGHT, LinearQueries
from cir_core.search.top_k import TopK

_COLUMNS = 256  # queries of one product: 4096 x 256 bfloat16 are 2 MiB, a core's second-level cache
_TILE_CELLS = 2**21  # elements of a tile's rows: 4 MiB of bfloat16
_LISTS = 2**14  # (query, weighting) pairs with candidate lists at a time: bounds their memory
_UNIT = 2.0**-24
_ROUNDING_16 = 2.0**-8 * 1.01


def tile_rows(dim: int) -> int:
    """Rows of a tile."""
    return max(256, min(4096, _TILE_CELLS // dim // 256 * 256))


@dataclass
class _State:
    """A batch of queries between blocks."""

    queries: LinearQueries
    excluded: npt.NDArray[np.int64] | None
    best_score: npt.NDArray[np.float32]
    best_index: npt.NDArray[np.int64]
    products: list[list[Tensor]]  # scanned queries: of every product the right operands of the pieces
    scanned64: npt.NDArray[np.float64]  # [P, 3, Q]: norms of the float32 vector, of what its cast lost, of the cast
    scan_weights: npt.NDArray[np.float64]  # [Q, P, K]
    num_exact: int = 0
    fixed: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


class CompiledScan:
    """One pass over a gallery on the CPU, block by block."""

    def __init__(self, queries: LinearQueries, k: int, excluded: Tensor | None) -> None:
        self.num_keys, self.k, self.dim = queries.num_keys, k, queries.dim
        self.dtype = scan_dtype()
        self.direct = queries.num_keys == 1  # one product with the composed query is cheaper than one a part
        self.group = 16 if self.direct else 4
        # Neighbouring weightings share most of their rows: 21 alphas keep some ten times k, and as many that wait.
        self.capacity = 4 * k * min(queries.num_keys, 8) + 128
        self.tile_rows = tile_rows(queries.dim)
        step = max(1, _LISTS // queries.num_keys)
        starts = range(0, max(1, queries.num_queries), step)
        self.states = [self._state(queries.part(slice(at, at + step)), excluded, slice(at, at + step)) for at in starts]
        self.scratch = torch.empty(self.tile_rows, queries.dim, dtype=self.dtype, device="cpu")
        width = min(_COLUMNS, queries.num_queries)
        self.tables = torch.empty(len(self.states[0].products), self.tile_rows, width, dtype=self.dtype, device="cpu")

    @property
    def num_exact(self) -> int:
        """Rows scored exactly so far, over all queries."""
        return sum(state.num_exact for state in self.states)

    def _state(self, queries: LinearQueries, excluded: Tensor | None, rows: slice) -> _State:
        weights = queries.weights.numpy()
        parts = torch.stack(queries.parts)
        if self.direct:  # a float32 vector whose product with a row is the score, to rounding
            vectors = [torch.einsum("rq,rqd->qd", queries.weights[0], parts.double()).float()]
            scan_weights = np.ones((queries.num_queries, 1, 1))
        else:
            vectors, scan_weights = list(queries.parts), weights.transpose(2, 1, 0)
        scanned = [vector.to(self.dtype) for vector in vectors]
        norms = []
        for vector, cast in zip(vectors, scanned, strict=True):
            exact, rounded = vector.double(), cast.double()
            norms.append(torch.stack([exact.norm(dim=1), (exact - rounded).norm(dim=1), rounded.norm(dim=1)]).numpy())
        lists = (queries.num_queries, self.num_keys, self.k)
        state = _State(
            queries,
            None if excluded is None else np.ascontiguousarray(np.sort(excluded[rows].numpy(), axis=1)),
            np.full(lists, -np.inf, np.float32),
            np.full(lists, -1, np.int64),
            [[right_operand(piece) for piece in torch.split(cast, _COLUMNS)] for cast in scanned],
            np.stack(norms) + TINY,
            np.ascontiguousarray(scan_weights),
        )
        state.fixed = {
            "scan_weights": state.scan_weights.astype(np.float32),
            "queries": np.ascontiguousarray(parts.numpy()),
            "weights": np.ascontiguousarray(weights.transpose(1, 2, 0)),
            "best_score": state.best_score,
            "best_index": state.best_index,
        } | ({} if state.excluded is None else {"excluded": state.excluded})
        state.fixed["slack_terms"] = self._slack_terms(state)
        return state

    def _slack_terms(self, state: _State) -> npt.NDArray[np.float32]:
        # Twice the bound of float32 sums: matrix units flush and add in their own order.
        n = 2 * (self.dim + 16) * _UNIT
        gamma = 1.01 * n / (1 - n)
        whole, lost, kept = (state.scanned64[:, which].T for which in range(3))  # [Q, P]
        shares = np.abs(state.scan_weights)
        sums = np.einsum("rqk,rq->qk", np.abs(state.fixed["weights"]), state.queries.norms.numpy() + TINY)
        terms = [
            np.einsum("qpk,qp->qk", shares, whole),
            np.einsum("qpk,qp->qk", shares, lost + (gamma + 16 * _UNIT) * kept) + (self.dim + 16) * 2.0**-50 * sums,
            16 * _UNIT * sums,
        ]
        return np.ascontiguousarray(np.stack(terms) * 1.000001 + TINY_WEIGHT, dtype=np.float32)

    def add(self, block: RowBlock) -> None:
        """Search one block of rows on the CPU."""
        rows = kernels.Rows(block.rows, block.first_index, block.indices)
        prepared = block.prepared if block.prepared is not None and block.prepared.scanned.dtype == self.dtype else None
        centre = prepared.centre if prepared else self._centre(block)
        for state in self.states:
            batch = self._batch(state, centre)
            for start in range(0, rows.num_rows, self.tile_rows):
                stop = min(start + self.tile_rows, rows.num_rows)
                if prepared:
                    tile, stats = prepared.tile(start, stop)
                else:
                    tile = self.scratch[: stop - start]
                    stats = cast_checked(rows, start, stop, centre, tile)
                self._scan(batch, rows, state, tile, start, stats)
            for piece in batch:
                kernels.settle_block(piece, rows)
                state.num_exact += int(piece.arrays["num_exact"].sum())

    def _centre(self, block: RowBlock) -> Tensor:
        """float32[D]: a mean of rows for bfloat16; zero for float32, whose rounding is small as it is."""
        return mean_row(block.rows) if self.dtype == torch.bfloat16 else no_centre(self.dim)

    def _batch(self, state: _State, centre: Tensor) -> list[kernels.Batch]:
        """The state's queries in pieces of one product each, with empty lists for a new block."""
        parts = state.fixed["queries"].astype(np.float64)
        dots = np.einsum("rqd,d->rq", parts, centre.double().numpy())
        offsets = np.einsum("rqk,rq->qk", state.fixed["weights"], dots)
        full = state.best_index[:, :, -1] >= 0
        bar = np.where(full, state.best_score[:, :, -1] - offsets, -np.inf)
        bar32 = np.nextafter(bar.astype(np.float32), np.float32(-np.inf))
        rho = _ROUNDING_16 if self.dtype == torch.bfloat16 else 0.0
        pieces = []
        for start in range(0, state.queries.num_queries, _COLUMNS):
            rows = slice(start, start + _COLUMNS)
            arrays = {
                name: np.ascontiguousarray(state.fixed[name][:, rows]) for name in ("queries", "weights", "slack_terms")
            }
            arrays |= {name: state.fixed[name][rows] for name in ("scan_weights", "best_score", "best_index")}
            if state.excluded is not None:
                arrays["excluded"] = state.excluded[rows]
            arrays |= {"offsets": offsets[rows], "bar": bar32[rows]}
            pieces.append(kernels.Batch(k=self.k, capacity=self.capacity, group=self.group, rho=rho, arrays=arrays))
        return pieces

    def _scan(
        self, batch: list[kernels.Batch], rows: kernels.Rows, state: _State, tile: Tensor, start: int, stats: Any
    ) -> None:
        for number, piece in enumerate(batch):
            tables = []
            for table, operands in zip(self.tables, state.products, strict=True):
                out = table.view(-1)[: len(tile) * piece.num_queries].view(len(tile), piece.num_queries)
                tables.append(multiply(tile, operands[number], out))
            kernels.scan_tile(piece, rows, tables, first_row=start, stats=stats)

    def results(self) -> list[TopK]:
        """One TopK a key."""
        scores = np.concatenate([state.best_score for state in self.states])
        indices = np.concatenate([state.best_index for state in self.states])
        return [
            TopK(torch.from_numpy(scores[:, key].copy()), torch.from_numpy(indices[:, key].copy()))
            for key in range(self.num_keys)
        ]


def no_centre(dim: int) -> Tensor:
    """float32[D] of zeros on the CPU, whatever torch's defaults are: the loops read its memory."""
    return torch.zeros(dim, dtype=torch.float32, device="cpu")


def mean_row(rows: Tensor | npt.NDArray[Any]) -> Tensor:
    """float32[D]: the mean of at most 4096 rows from all over a block; zero where it is not finite."""
    some = rows[:: max(1, len(rows) // 4096)][:4096]
    mean = (some if isinstance(some, Tensor) else torch.from_numpy(some.astype(np.float32))).float().mean(0)
    return mean if bool(mean.abs().max() <= MAX_NORM) else torch.zeros_like(mean)


def cast_checked(rows: kernels.Rows, start: int, stop: int, centre: Tensor, out: Tensor) -> tuple[float, ...]:
    """Cast rows for the scan; return the tile's stats, rounded up. CirError for rows that are not finite."""
    found = kernels.cast_rows(rows, start, stop, centre, out, MAX_NORM)
    if isinstance(found, int):
        indices = rows.kept[1]
        raise CirError(not_finite(rows.c.first_index + found if indices is None else int(indices[found])))
    residual, scanned, norm = (float(value) * 1.001 + TINY for value in found)
    # The subtraction of the centre was rounded itself.
    return (residual + 2 * _UNIT * (residual + scanned) * float(bool(centre.any())), scanned, norm)
