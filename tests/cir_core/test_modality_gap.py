import math

import pytest
import torch

from cir_core import modality_gap as module
from cir_core.modality_gap import modality_gap, uniformity
from cir_core.schema import CirError


def unit(*shape: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[:, 0] += shift
    return rows / rows.norm(dim=1, keepdim=True)


def test_every_measure_against_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4)  # several blocks, the last one short
    image, text = unit(11, 5, seed=1, shift=2.0), unit(11, 5, seed=2, shift=-1.0)
    found = modality_gap(image, text)
    rows, different = range(11), [(i, j) for i in range(11) for j in range(11) if i != j]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    matched = mean([float(image[i] @ text[i]) for i in rows])
    inside = [mean([1 - float(x[i] @ x[j]) for i, j in different]) for x in (image, text)]
    assert found.centroid_distance == pytest.approx(float((image.mean(0) - text.mean(0)).norm()))
    assert found.matched_cosine == pytest.approx(matched)
    assert found.unmatched_cosine == pytest.approx(mean([float(image[i] @ text[j]) for i, j in different]))
    assert found.alignment == pytest.approx(mean([float((image[i] - text[i]).square().sum()) for i in rows]))
    for x, uniform in ((image, found.image_uniformity), (text, found.text_uniformity)):
        kernel = [math.exp(-2 * float((x[i] - x[j]).square().sum())) for i, j in different]
        assert uniform == pytest.approx(math.log(mean(kernel)))
    assert found.relative_gap == pytest.approx((1 - matched) / (1 - matched + mean(inside)))


def test_identical_towers_have_no_gap_and_collapsed_ones_no_spread() -> None:
    rows = unit(50, 8, seed=1)
    same = modality_gap(rows, rows)
    assert (same.centroid_distance, same.alignment) == (0.0, 0.0)
    assert same.matched_cosine == pytest.approx(1.0)
    assert same.relative_gap == pytest.approx(0.0, abs=1e-12)
    assert uniformity(rows[:1].expand(5, 8)) == pytest.approx(0.0, abs=1e-12)
    opposite = modality_gap(rows[:1].expand(5, 8), -rows[:1].expand(5, 8))
    assert opposite.centroid_distance == pytest.approx(2.0)
    assert opposite.relative_gap == pytest.approx(1.0)


def test_bad_input_is_named() -> None:
    rows = unit(4, 3, seed=1)
    with pytest.raises(CirError, match=r"\[3, 3\]"):
        modality_gap(rows, rows[:3])
    with pytest.raises(CirError, match="N >= 2"):
        modality_gap(rows[:1], rows[:1])
    bad = rows.clone()
    bad[2] *= 3
    with pytest.raises(CirError, match="text row 2 has norm 3"):
        modality_gap(rows, bad)
