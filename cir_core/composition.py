"""Six ways to turn a reference image and a relative caption into one query, all linear in the two embeddings.

Every method is a pair of weights per query: composed = image_weight * v + text_weight * w, with v the image
embedding, w the text embedding, both of unit norm. The score against a gallery image g is then image_weight *
(v.g) + text_weight * (w.g), which is why one pass over a gallery answers every method and every alpha
(cir_core.search).

    method         weights before scaling           unit norm  alpha
    image_only     1, 0                              yes        no
    text_only      0, 1                              yes        no
    sum            1, 1                              yes        no    the "image + text" baseline of Pic2Word
    nlerp          1 - alpha, alpha                  yes        yes   the chord
    slerp          sin((1-a)t)/sin t, sin(at)/sin t  yes        yes   the arc; arXiv 2405.00571, section 3
    score_fusion   1 - alpha, alpha                  no         yes   the weighted mean of the two scores

alpha = 0 is the image alone and alpha = 1 the text alone. All arithmetic is float64, because the weights of
almost opposite embeddings are large and cancel; results come back in float32 unless an input was float64.

At an angle of pi (v = -w) the arc has no direction and the chord may be the zero vector. Every method that
normalises then returns the NEARER END: the image for alpha < 0.5, the text for alpha >= 0.5 (sum counts as
alpha = 0.5). "At pi" means |v + w| < 1e-6, below what rounding to float32 leaves of the true direction.

Shapes: Q queries, D embedding dimensions, ... any leading dimensions.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cir_core.schema import CirError

# 1 + cosine = |v + w|^2 / 2 at the |v + w| below which the embeddings count as opposite.
_OPPOSITE = 0.5e-12
# 1 - cosine below which sin(ta)/sin(t) is taken from its series: the first term left out is of the order
# 1e-16.
_PARALLEL = 1e-8
# Storage in float16 moves a norm by up to 2^-11, in bfloat16 by up to 2^-8; inputs are normalised again
# inside.
_NORM_TOLERANCE = 1e-3
_NORM_TOLERANCE_BFLOAT16 = 1e-2
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Weights = tuple[Tensor, Tensor]
Rows = Tensor | npt.NDArray[np.floating[Any]]
# (1 - cosine, 1 + cosine, alpha), all float64 and broadcastable -> weights of the unit embeddings
_WeightFunction = Callable[[Tensor, Tensor, Tensor], Weights]


@dataclass(frozen=True, slots=True)
class Method:
    """A composition method: its weights, whether it has an alpha, and whether its result has unit norm."""

    weights: _WeightFunction
    takes_alpha: bool
    unit_norm: bool = True


def slerp(image: Tensor, text: Tensor, alpha: float | Tensor) -> Tensor:
    """Spherical interpolation from `image` (alpha = 0) to `text` (alpha = 1).

    image, text: floating point [..., D] of unit norm, broadcast against each other.
    alpha: in [0, 1]; a number or a tensor that broadcasts against the leading dimensions `...`.
    Returns [..., D] of unit norm, float64 if an input was float64, else float32.

    The angle is 2 atan2(|v - w|, |v + w|), exact at both ends (Kahan, "How Futile are Mindless Assessments of
    Roundoff", section 12). Values and gradients are finite everywhere; at angle 0 the result is the
    normalised chord, at pi the nearer end (module docstring). Raises CirError for inputs that are not unit
    vectors or an alpha outside [0, 1].
    """
    return compose("slerp", image, text, alpha)


def slerp_weights(cosine: float | Tensor, alpha: float | Tensor) -> Weights:
    """Slerp as (image_weight, text_weight), float64, for embeddings with this cosine; gradients are finite.

    cosine: in [-1, 1] (overshoot by rounding, up to 1e-3, is accepted); alpha: in [0, 1]; they broadcast.
    """
    return composition_weights("slerp", cosine, alpha)


def composition_weights(method: str, cosine: float | Tensor, alpha: float | Tensor | None = None) -> Weights:
    """Weights (image_weight, text_weight), float64, broadcast of `cosine` and `alpha`, of unit embeddings.

    cosine: [...] between image and text embedding. A cosine near -1 cannot hold the angle; where that matters
    use `query_weights`, which reads the embeddings.
    alpha: required by the methods of `takes_alpha`, refused by the others. Raises CirError for values out of
    range.
    """
    chosen, alpha_t = _method(method), _alpha(method, alpha)
    cosine_t = torch.as_tensor(cosine, dtype=torch.float64)
    if not bool((cosine_t.abs() <= 1 + _NORM_TOLERANCE).all()):
        raise CirError("cosine must lie in [-1, 1]: divide the embeddings by their norms first")
    return chosen.weights(1 - cosine_t, 1 + cosine_t, alpha_t.to(cosine_t.device))


def query_weights(
    method: str, image: Tensor, text: Tensor, alpha: float | Tensor | None = None, *, rows: str = "query"
) -> Weights:
    """Weights (image_weight, text_weight), float64[...], of these very embeddings [..., D].

    image_weight * image + text_weight * text is the composed query: what rounding did to the norms of the
    embeddings is divided out. `rows` names the inputs in error messages. Raises CirError as `slerp` does.
    """
    chosen, alpha_t = _method(method), _alpha(method, alpha)
    image64, image_norm = _unit(image, f"{rows} image")
    text64, text_norm = _unit(text, f"{rows} text")
    if image.shape[-1] != text.shape[-1]:
        raise CirError(f"image embeddings have D = {image.shape[-1]}, text embeddings D = {text.shape[-1]}")
    one_minus_cosine = (image64 - text64).square().sum(-1) / 2
    one_plus_cosine = (image64 + text64).square().sum(-1) / 2
    image_weight, text_weight = chosen.weights(one_minus_cosine, one_plus_cosine, alpha_t.to(image.device))
    return image_weight / image_norm, text_weight / text_norm


def compose(method: str, image: Tensor, text: Tensor, alpha: float | Tensor | None = None) -> Tensor:
    """The composed query [..., D] of any method: unit norm, except for score_fusion.

    image, text, alpha, dtypes and errors as in `slerp`; alpha only for the methods of `takes_alpha`.
    """
    image_weight, text_weight = query_weights(method, image, text, alpha)
    composed = image_weight.unsqueeze(-1) * image.double() + text_weight.unsqueeze(-1) * text.double()
    return composed.to(torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32))


def mean_texts(text_TD: Tensor, counts: Sequence[int]) -> Tensor:
    """Average the embeddings of each query's captions and bring the mean back to unit norm.

    text_TD: floating point [T, D] of unit norm, the captions of all queries in order (`Query.captions`).
    counts: captions per query, each at least 1, T in all. Returns [Q, D], float64 if the input was float64,
    else float32; a query with one caption keeps its embedding. FashionIQ's "averaged" join (SEARLE's
    evaluation code). Raises CirError for counts that do not fit, and for captions whose mean has no direction.

    >>> mean_texts(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), [2, 1])
    tensor([[0.7071, 0.7071],
            [0.6000, 0.8000]])
    """
    if any(count < 1 for count in counts) or sum(counts) != text_TD.shape[0]:
        raise CirError(f"mean_texts: counts must be at least 1 and add up to {text_TD.shape[0]} captions")
    kept = text_TD if text_TD.dtype == torch.float64 else text_TD.float()
    if all(count == 1 for count in counts):
        return kept
    sizes = torch.tensor(list(counts), device=text_TD.device)
    owners = torch.repeat_interleave(torch.arange(len(counts), device=text_TD.device), sizes)
    sums = torch.zeros(len(counts), text_TD.shape[1], dtype=torch.float64, device=text_TD.device)
    sums = sums.index_add(0, owners, _unit(text_TD, "text")[0])
    norms = sums.norm(dim=-1, keepdim=True)
    if bool((norms < 1e-6).any()):
        row = int((norms[:, 0] < 1e-6).nonzero()[0])
        raise CirError(
            f"mean_texts: the captions of the query at position {row} cancel out; their mean has no direction"
        )
    alone = (sizes == 1)[:, None]
    first = torch.cumsum(sizes, 0) - sizes
    return torch.where(alone, kept[first], (sums / norms).to(kept.dtype))


def compose_gallery(image_GD: Rows, text_GD: Rows, captioned: Tensor, alpha: float) -> Tensor:
    """Compose gallery images with their own captions: slerp(image, text, alpha) where `captioned`, else the image.

    image_GD, text_GD: floating point [G, D] of unit norm; captioned: bool[G]. Returns [G, D], float64 if an input was
    float64, else float32. A row depends on nothing but itself. Raises CirError as `slerp` does.
    """
    image, text = (torch.tensor(rows) if isinstance(rows, np.ndarray) else rows for rows in (image_GD, text_GD))
    composed = slerp(image, text, alpha)
    return torch.where(captioned[:, None], composed, image.to(composed.dtype))


def takes_alpha(method: str) -> bool:
    """Whether `method` has an alpha. Raises CirError for an unknown name."""
    return _method(method).takes_alpha


def _sine_ratio(fraction: Tensor, one_minus_cosine: Tensor, one_plus_cosine: Tensor) -> Tensor:
    """sin(fraction * t) / sin(t) for 0 <= t < pi, with finite gradients.

    torch.where passes gradients of the branch not taken, and 0 * inf is NaN: so that branch sees an angle of
    pi/2.
    """
    edge = (one_minus_cosine < _PARALLEL) | (one_plus_cosine < _OPPOSITE)
    half_sine, half_cosine = (torch.where(edge, 1.0, x).sqrt() for x in (one_minus_cosine, one_plus_cosine))
    angle = 2 * torch.atan2(half_sine, half_cosine)
    series = fraction * (1 + (1 - fraction.square()) * one_minus_cosine / 3)  # t^2 = 2 (1 - cos t) + O(t^4)
    return torch.where(edge, series, torch.sin(fraction * angle) / torch.sin(angle))


def _nearer_end(alpha: Tensor, opposite: Tensor, weights: Weights) -> Weights:
    """Weights (1, 0) or (0, 1) where `opposite`, else `weights`."""
    text_end = (alpha >= 0.5).double()
    return torch.where(opposite, 1 - text_end, weights[0]), torch.where(opposite, text_end, weights[1])


def _slerp(one_minus_cosine: Tensor, one_plus_cosine: Tensor, alpha: Tensor) -> Weights:
    image_weight = _sine_ratio(1 - alpha, one_minus_cosine, one_plus_cosine)
    text_weight = _sine_ratio(alpha, one_minus_cosine, one_plus_cosine)
    return _nearer_end(alpha, one_plus_cosine < _OPPOSITE, (image_weight, text_weight))


def _nlerp(_: Tensor, one_plus_cosine: Tensor, alpha: Tensor) -> Weights:
    """|(1-a) v + a w|^2 = (1 - 2a)^2 + 2 a (1-a) (1 + cosine): a sum of positive terms, nothing cancels."""
    squared = (1 - 2 * alpha).square() + 2 * alpha * (1 - alpha) * one_plus_cosine
    opposite = (one_plus_cosine < _OPPOSITE) + torch.zeros_like(squared, dtype=torch.bool)
    norm = torch.where(opposite, 1.0, squared).sqrt()
    return _nearer_end(alpha, opposite, ((1 - alpha) / norm, alpha / norm))


def _sum(one_minus_cosine: Tensor, one_plus_cosine: Tensor, alpha: Tensor) -> Weights:
    return _nlerp(one_minus_cosine, one_plus_cosine, torch.full_like(alpha, 0.5))


def _constant(image_weight: float, text_weight: float) -> _WeightFunction:
    def weights(_: Tensor, one_plus_cosine: Tensor, _alpha: Tensor) -> Weights:
        shape = torch.zeros_like(one_plus_cosine)
        return shape + image_weight, shape + text_weight

    return weights


def _score_fusion(_: Tensor, one_plus_cosine: Tensor, alpha: Tensor) -> Weights:
    shape = torch.zeros_like(one_plus_cosine)
    return (1 - alpha) + shape, alpha + shape


METHODS: dict[str, Method] = {
    "image_only": Method(_constant(1.0, 0.0), takes_alpha=False),
    "text_only": Method(_constant(0.0, 1.0), takes_alpha=False),
    "sum": Method(_sum, takes_alpha=False),
    "nlerp": Method(_nlerp, takes_alpha=True),
    "slerp": Method(_slerp, takes_alpha=True),
    "score_fusion": Method(_score_fusion, takes_alpha=True, unit_norm=False),
}


def _method(name: str) -> Method:
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise CirError(f"unknown composition method {name!r}{hint} Known: {', '.join(METHODS)}")


def _alpha(method: str, alpha: float | Tensor | None) -> Tensor:
    """Alpha as float64, checked; zero for a method that has none."""
    if alpha is None or not METHODS[method].takes_alpha:
        if alpha is None and METHODS[method].takes_alpha:
            raise CirError(f"{method} needs an alpha in [0, 1]: 0 is the image alone, 1 the text alone")
        if alpha is not None:
            raise CirError(f"{method} has no alpha: leave it out")
        return torch.zeros((), dtype=torch.float64)
    checked = torch.as_tensor(alpha, dtype=torch.float64)
    if not bool(((checked >= 0) & (checked <= 1)).all()):
        raise CirError(f"alpha must lie in [0, 1] (0 is the image alone, 1 the text alone), got {alpha}")
    return checked


def _unit(rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Rows [..., D] as float64 of unit norm, and the norms [...] they had; CirError names the worst row."""
    if rows.dtype not in _FLOATS or rows.ndim == 0 or rows.shape[-1] == 0:
        raise CirError(f"{name} embeddings must be floating point [..., D], got {rows.dtype} {list(rows.shape)}")
    rows64 = rows.double()
    norms = torch.linalg.vector_norm(rows64, dim=-1)
    error = (norms.detach() - 1).abs().reshape(-1)
    tolerance = _NORM_TOLERANCE_BFLOAT16 if rows.dtype == torch.bfloat16 else _NORM_TOLERANCE
    if not bool((error <= tolerance).all()):
        worst = int(error.nan_to_num(nan=torch.inf).argmax())
        norm = float(norms.detach().reshape(-1)[worst])
        raise CirError(
            f"{name} embeddings must have unit norm (within {tolerance}): row {worst} has norm {norm:.6g}. "
            "Divide each row by its norm"
        )
    return rows64 / norms.unsqueeze(-1), norms
