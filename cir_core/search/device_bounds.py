"""The error bound of the scan on a device, and the weighted sums of products that are held against it.

Error bound. Vectors: x a part of a query, w its weight, y what is multiplied (the composed query, float32, where one
weighting is asked for, with weight a = 1; else the parts, a = w), y' = bfloat16(y); g a row, c the centre of its tile,
g' = bfloat16(g - c); s the product y' . g' as it is stored. Then

    y . (g - c) = y . (g - c - g') + (y - y') . g' + y' . g'

so that by Cauchy and Schwarz, with R, G' and G the largest |g - c - g'|, |g'| and |g| of the tile, the exact score S,
the offset o = sum of w (x . c), u = 2^-24, and sums over the vectors that are multiplied, of two kinds for w and x:

    |S - o - sum of a s| <= E = sum |a| (|y| R + (|y - y'| + (gamma + 16 u) |y'|) G')
                                + sum |w| |x| (16 u G + (D + 16) 2^-50 G') + rounding of the products where they are stored

16 u |y'| G' pays for the float32 arithmetic on products and for y's own rounding; 16 u G for the rounding of S to float32
and for the float64 sums in S, o and the comparison as far as they are rounded relative to |g| (2^-53 D < u); the term in
2^-50 for those relative to |c| <= G + G' + R and for weights that cancel. TINY stands in for what underflows.

gamma bounds the sums of the matrix units. They are no IEEE sums: a block of m products and the sum so far are aligned to
the largest of them, cut, added, and cut again (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores",
2021; later generations: Khattak, Mikaitis, "Accurate models of NVIDIA tensor cores", arXiv 2512.07004). Assumed is that no
cut leaves fewer than float32's 24 bits, and nothing of m but 1 <= m <= 32. A block errs by less than 2 u (m + 2) |y'| |g'|,
and there are at most D / m + 1 of them: in all 2 u (D + 2 D / m + m + 2), below 8 u (D + 32) with room for sums that are
split and added in float32. `ieee_float32` forbids to add them in bfloat16.

Products stored in bfloat16, of 8 significant bits, are off by up to rho = 2^-8 of themselves; stored in float32 by
nothing more. x + rho |x| and x - rho |x| both rise with x, so bounds of stored products come from stored maxima.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from cir_core.search.queries import TINY, TINY_WEIGHT, LinearQueries

_UNIT = 2.0**-24
_RHO = 2.0**-8 * 1.01
_STEPS = 128  # of the staircase that two products are held against


def rounding_of(dtype: torch.dtype) -> float:
    """rho: what a product that is stored so may be off by, as a share of itself."""
    return _RHO if dtype == torch.bfloat16 else 0.0


def weighted(weights: Tensor, positive: Tensor, negative: Tensor, *, any_negative: bool) -> Tensor:
    """[..., q, n]: weighted sums of `positive` where a weight is, and of `negative` where it is negative.

    weights: [..., R, q]. positive, negative: [R, q, n]; the latter is not read where there is no such weight.
    """
    terms: list[Tensor] = []
    for part in range(len(positive)):
        weight = weights.select(-2, part)[..., None]
        terms.append((weight.clamp(min=0) if any_negative else weight) * positive[part])
        if any_negative:
            terms[part].addcmul_(weight.clamp(max=0), negative[part])
    return reduce(lambda total, more: total.add_(more), terms)


def opened_by_some(weights: Tensor, high: Tensor, limits: Tensor) -> Tensor:
    """bool[q, n]: where some weighting may reach its limit; a few places too many, for the price of about two weightings.

    weights: float32 [K, 2, q], none negative. high: float32 [2, q, n], bounds of both products from above. limits: [K, q].
    A weighting needs of the second product (limit - weight * first) / weight, and less where the first is larger: a table
    of what the most lenient weighting needs at the upper end of each of 128 ranges of the first answers for all.
    """
    first, second = high
    lowest, highest = first.aminmax(dim=1)
    step = ((highest.double() - lowest.double()) / _STEPS).clamp(min=1e-30)
    # Ranges are found in float32, to within 128 * 4 * 2^-24 of one; an upper end lies 0.01 of one higher.
    ends = lowest.double()[:, None] + step[:, None] * (torch.arange(_STEPS, device=high.device) + 1.01)
    rest = limits.double()[:, :, None] - weights[:, 0].double()[:, :, None] * ends
    share = weights[:, 1].double()[:, :, None]
    infinite = torch.full((), torch.inf, dtype=torch.float64, device=high.device)
    need = torch.where(share > 0, rest / share, torch.where(rest > 0, infinite, -infinite)).amin(0)
    need = torch.nextafter(need.float(), -infinite.float())
    place = ((first - lowest[:, None]) * (1 / step).float()[:, None]).long().clamp_(0, _STEPS - 1)
    opened: Tensor = second >= need.gather(1, place)
    return opened


def offsets_of(queries: LinearQueries, centre: Tensor) -> Tensor:
    """float64[K, q]: the scores of the centre."""
    dots = torch.stack([part.double() @ centre.double() for part in queries.parts])
    return (queries.weights * dots).sum(1)


def bound_terms(queries: LinearQueries, vectors: list[Tensor], scanned: list[Tensor], weights: Tensor) -> Tensor:
    """float64 [3, K, q]: E of the module docstring is their sum, weighted with R, G' and G."""
    n = 8 * (queries.dim + 32) * _UNIT
    gamma = n / (1 - n)
    exact, kept = torch.stack(vectors).double(), torch.stack(scanned).double()
    whole, lost, norms = (x.norm(dim=2) + TINY for x in (exact, exact - kept, kept))  # [R, q]
    shares = weights.abs()
    sums = (queries.weights.abs() * (queries.norms + TINY)).sum(1)  # [K, q]
    terms = [
        (shares * whole).sum(1),
        (shares * (lost + (gamma + 16 * _UNIT) * norms)).sum(1) + (queries.dim + 16) * 2.0**-50 * sums,
        16 * _UNIT * sums,
    ]
    return torch.stack(terms) * 1.000001 + TINY_WEIGHT
