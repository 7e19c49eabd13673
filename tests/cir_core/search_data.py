"""Rows made to break a scan, and the naive search to compare with; for the tests of the search."""

from __future__ import annotations

import numpy as np
import torch

from cir_core.search import TopK
from cir_core.search.queries import LinearQueries
from cir_core.search.top_k import torch_pair_dots


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


def cone(*shape: int, seed: int) -> torch.Tensor:
    """Unit vectors around one direction, as embeddings of one modality are."""
    return torch.nn.functional.normalize(unit(*shape, seed=seed) + 3 * unit(1, shape[1], seed=99), dim=-1)


def nearly_equal(*shape: int, seed: int) -> torch.Tensor:
    """Rows apart by less than bfloat16 resolves: most round to the same scanned row."""
    steps = torch.randint(-3, 4, shape, generator=generator(seed))
    return (unit(1, shape[1], seed=seed).expand(shape).contiguous().view(torch.int32) + steps.int()).view(torch.float32)


def copies(*shape: int, seed: int) -> torch.Tensor:
    return unit(3, shape[1], seed=seed)[torch.randint(0, 3, shape[:1], generator=generator(seed))]


def halfway(*shape: int, seed: int) -> torch.Tensor:
    """Components exactly between two bfloat16 numbers: the largest rounding there is, all to one side or to the even."""
    bits = unit(*shape, seed=seed).view(torch.int32)
    return ((bits & -65536) | 0x8000).view(torch.float32)


def wild_norms(*shape: int, seed: int) -> torch.Tensor:
    exponents = torch.randint(-20, 20, (shape[0], 1), generator=generator(seed))
    return unit(*shape, seed=seed) * 2.0**exponents


def tiny(*shape: int, seed: int) -> torch.Tensor:
    """Components that bfloat16 products lose to underflow, and a row of zeros."""
    rows = unit(*shape, seed=seed) * 1e-30
    rows[0] = 0
    return rows


def negative(*shape: int, seed: int) -> torch.Tensor:
    """Every score below zero against the same direction."""
    return -cone(*shape, seed=seed)


KINDS = (unit, cone, nearly_equal, copies, halfway, wild_norms, tiny, negative)


def same(found: TopK, expected: TopK) -> None:
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)


def brute_force(queries: LinearQueries, gallery: torch.Tensor, k: int, exclude: torch.Tensor) -> list[TopK]:
    """Every pair scored by the definition in torch, and sorted whole by (-score, index)."""
    q, g = torch.cartesian_prod(torch.arange(queries.num_queries), torch.arange(len(gallery))).unbind(1)
    dots = [torch_pair_dots(part, gallery.float(), q, g) for part in queries.parts]
    results = []
    for key in range(queries.num_keys):
        table = queries.exact_scores(key, q, dots).view(queries.num_queries, -1).numpy()
        scores = np.full((len(table), k), -np.inf, np.float32)
        indices = np.full((len(table), k), -1)
        for row, line in enumerate(table):
            allowed = np.setdiff1d(np.arange(len(line)), exclude[row].numpy())
            order = allowed[np.lexsort((allowed, -line[allowed]))][:k]
            scores[row, : len(order)], indices[row, : len(order)] = line[order], order
        results.append(TopK(torch.from_numpy(scores), torch.from_numpy(indices)))
    return results
