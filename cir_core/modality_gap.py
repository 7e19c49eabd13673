"""How far image and text embeddings of matched pairs lie apart: what Text-Anchored-Tuning is meant to close.

Shapes: N matched pairs (row i of one belongs to row i of the other), D embedding dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cir_core.schema import CirError

_BLOCK = 2048  # rows of a block of the pairwise table in `uniformity`: at most 32 MiB of float64


@dataclass(frozen=True, slots=True)
class ModalityGap:
    """Measures of N matched unit embeddings.

    centroid_distance: |mean image - mean text|, in [0, 2] (Liang et al., arXiv 2203.02053, section 2).
    matched_cosine: mean cosine of the pairs, 1 for identical towers; unmatched_cosine: of all other
    image-text pairings.
    alignment: mean squared distance of the pairs, in [0, 4] (Wang and Isola, arXiv 2005.10242, equation 1,
    exponent 2).
    image_uniformity, text_uniformity: log of the mean of exp(-2 squared distance) over pairs of different
    rows of one modality, in [-8, 0], lower is more evenly spread (equation 2 there, t = 2).
    relative_gap: mean cosine distance of the pairs, divided by itself plus the mean cosine distance inside a
    modality (the average of both), in [0, 1]: 0 without a gap, 0.5 where a pair is as far apart as two random
    images or texts.
    """

    centroid_distance: float
    matched_cosine: float
    unmatched_cosine: float
    alignment: float
    image_uniformity: float
    text_uniformity: float
    relative_gap: float


def modality_gap(image_ND: Tensor, text_ND: Tensor) -> ModalityGap:
    """All measures, in float64, of floating point [N, D] pairs of unit norm, N >= 2.

    Time is O(N^2 D) for the uniformities (sample some ten thousand pairs of a large set) and O(N D) for the
    rest.
    Raises CirError for shapes that disagree, N < 2, or rows that are not unit vectors.

    >>> gap = modality_gap(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> gap.centroid_distance, gap.matched_cosine, gap.unmatched_cosine, gap.alignment, gap.relative_gap
    (0.0, 0.0, 1.0, 2.0, 0.5)
    """
    image, text = _checked(image_ND, text_ND)
    count = len(image)
    matched = float((image * text).sum(1).mean())
    image_sum, text_sum = image.sum(0), text.sum(0)
    unmatched = (float(image_sum @ text_sum) / count - matched) / (count - 1)
    inside = [1 - (float(total @ total) / count - 1) / (count - 1) for total in (image_sum, text_sum)]
    spread = (1 - matched) + sum(inside) / 2
    return ModalityGap(
        centroid_distance=float((image_sum - text_sum).norm()) / count,
        matched_cosine=matched,
        unmatched_cosine=unmatched,
        alignment=float((image - text).square().sum(1).mean()),
        image_uniformity=uniformity(image),
        text_uniformity=uniformity(text),
        relative_gap=(1 - matched) / spread if spread > 0 else 0.0,
    )


def uniformity(rows_ND: Tensor) -> float:
    """log mean exp(-2 |x - y|^2) over the N (N - 1) / 2 pairs of different rows of unit norm [N, D], N >=
    2."""
    rows = rows_ND.double()
    total = 0.0
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        for other in range(start, len(rows), _BLOCK):
            similarity = torch.exp(4 * (block @ rows[other : other + _BLOCK].T - 1))  # |x - y|^2 = 2 - 2 x.y
            total += float(similarity.triu(1).sum() if other == start else similarity.sum())
    return math.log(total / (len(rows) * (len(rows) - 1) / 2))


def _checked(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    if image.ndim != 2 or image.shape != text.shape or len(image) < 2:
        raise CirError(
            f"modality_gap: image {list(image.shape)} and text {list(text.shape)} must share a shape [N, D], N >= 2"
        )
    units = []
    for name, rows in (("image", image.detach().double()), ("text", text.detach().double())):
        norms = rows.norm(dim=1, keepdim=True)
        off = ~((norms - 1).abs() <= 1e-2)
        if bool(off.any()):
            row = int(off[:, 0].int().argmax())
            raise CirError(
                f"modality_gap: {name} row {row} has norm {float(norms[row]):.4g}, expected 1: normalise the rows"
            )
        units.append(rows / norms)
    return units[0], units[1]
