"""Queries whose scores are weighted sums of inner products, and lists of gallery indices for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cir_core.schema import CirError
from cir_core.search.blocks import MAX_NORM

IndexLists = Tensor | Sequence[int] | Sequence[Sequence[int]]
# Stands in for norms and products lost to underflow: they are below 1e-19 a component, so below this for D <
# 1e8.
TINY = 1e-15
# Stands in for weights and weighted products lost to underflow in float32, 1.2e-38 each: times TINY it is above the
# latter, and times a norm above the former times any product.
TINY_WEIGHT = 1e-21


@dataclass(frozen=True, slots=True)
class LinearQueries:
    """Q queries under K weightings: score = sum over parts p of weights[key, p, q] * (parts[p][q] . g).

    parts: float32 [Q, D] each; weights: float64 [K, P, Q]; norms: float64 [P, Q].
    """

    parts: tuple[Tensor, ...]
    weights: Tensor
    norms: Tensor

    @classmethod
    def checked(cls, parts: tuple[Tensor, ...], weights: Tensor) -> LinearQueries:
        """Check that the parts have one shape and that the weights are usable."""
        if len({part.shape for part in parts}) != 1:
            raise CirError(f"image and text queries must share a shape, not {[tuple(part.shape) for part in parts]}")
        if not bool((weights.abs() <= MAX_NORM).all()):
            raise CirError(f"composition weights must be finite and at most {MAX_NORM:g}")
        norms = torch.stack([torch.linalg.vector_norm(part.double(), dim=1) for part in parts])
        return cls(parts, weights.detach(), norms)

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.parts[0].shape[0]

    @property
    def num_keys(self) -> int:
        """K."""
        return self.weights.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.parts[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Where the parts are, and so where the work is done."""
        return self.parts[0].device

    def part(self, rows: slice) -> LinearQueries:
        """Return some of the queries."""
        parts = tuple(part[rows] for part in self.parts)
        return LinearQueries(parts, self.weights[:, :, rows], self.norms[:, rows])

    def error_scale(self) -> Tensor:
        """float64 [K, Q]: the error bound E of the module docstring divided by the largest |g|."""
        n = (self.dim + 8) * 2.0**-24
        return 1.01 * n / (1 - n) * (self.weights.abs() * (self.norms + TINY)).sum(1) + TINY_WEIGHT

    def exact_scores(self, key: int | Tensor, query: Tensor, dots: Sequence[Tensor]) -> Tensor:
        """float32[P]: the definition of a score, from float64 dots; the parts are added in order. key: one, or int64[P]."""
        total = self.weights[key, 0, query] * dots[0]
        for part in range(1, len(self.parts)):
            total = total + self.weights[key, part, query] * dots[part]
        return total.float()


def padded_indices(lists: object, num_queries: int, name: str, device: torch.device) -> Tensor:
    """Gallery indices of Q queries as int64[Q, m], m >= 1, -1 where there is none; CirError for anything
    else."""
    if isinstance(lists, Tensor):
        table = lists.reshape(-1, 1) if lists.ndim == 1 else lists
        integral = not (table.is_floating_point() or table.dtype == torch.bool)
    else:
        rows = [list(row) if isinstance(row, Sequence) else [row] for row in lists]  # type: ignore[attr-defined]
        width = max((len(row) for row in rows), default=1)
        flat = [index for row in rows for index in row]
        integral = all(isinstance(index, int) for index in flat)
        table = torch.tensor([row + [-1] * (width - len(row)) for row in rows] if integral else [], dtype=torch.int64)
    if not integral or table.ndim != 2 or len(table) != num_queries:
        raise CirError(
            f"{name} must be whole numbers, one row of gallery indices for each of the {num_queries} queries"
        )
    if table.numel() and int(table.min()) < -1:
        raise CirError(f"{name} holds the index {int(table.min())}; gallery indices start at 0, and -1 means none")
    return _without_repeats(table.to(device=device, dtype=torch.int64))


def _without_repeats(table: Tensor) -> Tensor:
    """Each row ascending, a repeated index replaced by -1; at least one column wide."""
    ordered = torch.nn.functional.pad(table, (0, 1), value=-1).sort(dim=1).values
    repeated = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return ordered.masked_fill(repeated, -1)
