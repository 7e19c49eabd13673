import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cir_core.composition import (
    METHODS,
    compose,
    composition_weights,
    query_weights,
    slerp,
    slerp_weights,
    takes_alpha,
)
from cir_core.schema import CirError

ALPHAS = (0.0, 1e-9, 0.1, 0.5, 0.8, 0.9, 1.0)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows / rows.norm(dim=-1, keepdim=True)).to(dtype)


def pair_at(angle: float, dim: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 unit vectors about `angle` apart."""
    image = unit(dim, seed=seed, dtype=torch.float64)
    other = unit(dim, seed=seed + 1, dtype=torch.float64)
    normal = other - (other @ image) * image
    normal /= normal.norm()
    return image.float(), (math.cos(angle) * image + math.sin(angle) * normal).float()


def naive_slerp(image: torch.Tensor, text: torch.Tensor, alpha: float) -> np.ndarray:
    """Long double on an orthonormal basis: cos(a t) v + sin(a t) n, n the part of w normal to v."""
    v, w = (x.numpy().astype(np.longdouble) for x in (image, text))
    v, w = v / np.sqrt((v * v).sum()), w / np.sqrt((w * w).sum())
    normal = w - (v * w).sum() * v
    size = np.sqrt((normal * normal).sum())
    angle = np.arctan2(size, (v * w).sum())
    return (np.cos(alpha * angle) * v + np.sin(alpha * angle) * normal / size).astype(np.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("angle", [1e-5, 1e-3, 0.03, 0.5, 1.5, 2.5, 3.0, 3.14, math.pi - 1e-4, math.pi - 1e-5])
def test_slerp_agrees_with_the_formula_and_has_unit_norm(angle: float, alpha: float) -> None:
    image, text = pair_at(angle)
    result = slerp(image, text, alpha)
    assert result.dtype == torch.float32
    assert np.abs(result.double().numpy() - naive_slerp(image, text, alpha)).max() < 1e-6
    assert abs(result.double().norm() - 1) < 1e-6


def test_the_ends_are_the_inputs_and_the_angle_is_divided() -> None:
    image, text = unit(200, 64, seed=1), unit(200, 64, seed=2)
    torch.testing.assert_close(slerp(image, text, 0.0), image, atol=1e-7, rtol=0)
    torch.testing.assert_close(slerp(image, text, 1.0), text, atol=1e-7, rtol=0)
    whole = torch.acos((image.double() * text.double()).sum(-1))
    part = torch.acos((image.double() * slerp(image, text, 0.3).double()).sum(-1))
    torch.testing.assert_close(part, 0.3 * whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_inputs_are_computed_and_returned_in_float32(dtype: torch.dtype) -> None:
    image, text = unit(9, 128, seed=1).to(dtype), unit(9, 128, seed=2).to(dtype)
    result = slerp(image, text, 0.8)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = np.stack([naive_slerp(v.double(), w.double(), 0.8) for v, w in zip(image, text, strict=True)])
    assert np.abs(result.double().numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-4, 1.0, math.pi - 1e-3, math.pi])
def test_values_and_gradients_are_finite_everywhere(name: str, alpha: float, angle: float) -> None:
    image, text = pair_at(angle)
    if angle in (0.0, math.pi):
        text = image.clone() if angle == 0 else -image
    image.requires_grad_()
    text.requires_grad_()
    alpha_t = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    result = compose(name, image, text, alpha_t if takes_alpha(name) else None)
    (result * torch.arange(1.0, 33.0)).sum().backward()
    assert torch.isfinite(result).all()
    for leaf in (image, text):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
    if METHODS[name].unit_norm:
        assert abs(result.detach().double().norm() - 1) < 1e-6


def test_parallel_is_the_chord_and_opposite_is_the_nearer_end() -> None:
    image = unit(5, 16)
    torch.testing.assert_close(slerp(image, image, 0.7), image, atol=1e-7, rtol=0)
    for name in ("slerp", "nlerp"):
        for alpha, expected in ((0.0, image), (0.49, image), (0.5, -image), (0.8, -image), (1.0, -image)):
            torch.testing.assert_close(compose(name, image, -image, alpha), expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(compose("sum", image, -image), -image, atol=1e-7, rtol=0)
    for alpha, expected in ((0.2, (1.0, 0.0)), (0.6, (0.0, 1.0))):
        assert tuple(float(weight) for weight in slerp_weights(-1.0, alpha)) == expected


def test_gradients_agree_with_finite_differences() -> None:
    for angle in (0.0, 1e-3, 1.0, 3.0):
        image, text = (x.double() for x in pair_at(angle, dim=4))
        if angle == 0:
            text = image.clone()

        def composed(v: torch.Tensor, w: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
            return slerp(v / v.norm(), w / w.norm(), alpha)

        alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        inputs = (image.requires_grad_(), text.requires_grad_(), alpha)
        assert torch.autograd.gradcheck(composed, inputs, eps=1e-6, atol=1e-4)


def test_slerp_weights_gradient_is_right_up_to_a_cosine_of_one() -> None:
    # sin(ta)/sin(t) = a (1 + (1 - a^2) (1 - cosine) / 3 + ...): its slope at cosine 1 is -a (1 - a^2) / 3.
    for below in (0.0, 1e-12, 1e-9, 1.1e-8, 1e-6):
        cosine = torch.tensor(1 - below, dtype=torch.float64, requires_grad=True)
        _, text_weight = slerp_weights(cosine, 0.6)
        (slope,) = torch.autograd.grad(text_weight, cosine)
        assert float(slope) == pytest.approx(-0.6 * (1 - 0.36) / 3, abs=1e-5)


def naive_compose(name: str, v: np.ndarray, w: np.ndarray, alpha: float) -> np.ndarray:
    mixed = {
        "image_only": v,
        "text_only": w,
        "sum": v + w,
        "nlerp": (1 - alpha) * v + alpha * w,
        "score_fusion": (1 - alpha) * v + alpha * w,
    }
    if name == "slerp":
        return naive_slerp(torch.from_numpy(v), torch.from_numpy(w), alpha)
    return mixed[name] if name == "score_fusion" else mixed[name] / np.linalg.norm(mixed[name])


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_against_its_definition_and_linear_in_the_scores(name: str) -> None:
    image, text, gallery = unit(7, 24, seed=1), unit(7, 24, seed=2), unit(50, 24, seed=3, dtype=torch.float64)
    alpha = 0.8 if takes_alpha(name) else None
    composed = compose(name, image, text, alpha).double()
    rows = zip(image.double().numpy(), text.double().numpy(), strict=True)
    expected = np.stack([naive_compose(name, v, w, 0.8) for v, w in rows])
    np.testing.assert_allclose(composed.numpy(), expected, atol=1e-6)
    cosine = (image.double() * text.double()).sum(-1)
    image_weight, text_weight = composition_weights(name, cosine, alpha)
    assert image_weight.dtype == text_weight.dtype == torch.float64
    assert image_weight.shape == text_weight.shape == (7,)
    linear = image_weight[:, None] * (image.double() @ gallery.T)
    linear += text_weight[:, None] * (text.double() @ gallery.T)
    torch.testing.assert_close(linear, composed @ gallery.T, atol=1e-6, rtol=0)


@given(cosine=st.floats(-0.999999, 1.0), alpha=st.floats(0.0, 1.0))
def test_weights_keep_the_norm_and_are_never_negative(cosine: float, alpha: float) -> None:
    for name, method in METHODS.items():
        a, b = composition_weights(name, cosine, alpha if method.takes_alpha else None)
        assert float(a) >= 0
        assert float(b) >= 0
        if method.unit_norm:
            assert float(a * a + b * b + 2 * a * b * cosine) == pytest.approx(1.0, abs=1e-8)


def test_query_weights_divide_out_the_rounding_of_the_norms() -> None:
    image, text = unit(6, 8, seed=1) * 1.0005, unit(6, 8, seed=2) * 0.9995
    image_weight, text_weight = query_weights("nlerp", image, text, 0.5)
    composed = image_weight[:, None] * image.double() + text_weight[:, None] * text.double()
    torch.testing.assert_close(composed.norm(dim=-1), torch.ones(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_alpha_broadcasts_as_a_tensor() -> None:
    image, text = unit(5, 8, seed=1), unit(5, 8, seed=2)
    alphas = torch.tensor([0.1, 0.5, 0.9])
    table = slerp(image, text, alphas[:, None])
    assert table.shape == (3, 5, 8)
    for row, alpha in zip(table, alphas.tolist(), strict=True):
        torch.testing.assert_close(row, slerp(image, text, alpha), atol=1e-7, rtol=0)
    per_query = slerp(image, text, torch.linspace(0, 1, 5))
    torch.testing.assert_close(per_query[4], text[4], atol=1e-7, rtol=0)


def test_bad_input_is_named() -> None:
    image, text = unit(4, 8, seed=1), unit(4, 8, seed=2)
    for factor, said in ((1.2, "row 2 has norm 1.2"), (float("nan"), "row 2 has norm nan"), (0.0, "norm 0")):
        bad = image.clone()
        bad[2] *= factor
        with pytest.raises(CirError, match=said):
            slerp(bad, text, 0.5)
    for alpha in (-0.1, 1.1, float("nan"), torch.tensor([0.5, 2.0, 0.5, 0.5])):
        with pytest.raises(CirError, match=r"\[0, 1\]"):
            slerp(image, text, alpha)
    with pytest.raises(CirError, match="did you mean 'slerp'"):
        compose("slrp", image, text, 0.5)
    with pytest.raises(CirError, match="needs an alpha"):
        compose("nlerp", image, text)
    with pytest.raises(CirError, match="has no alpha"):
        compose("sum", image, text, 0.5)
    with pytest.raises(CirError, match="D = 8"):
        slerp(image, unit(4, 6), 0.5)
    with pytest.raises(CirError, match="int64"):
        slerp(image.long(), text, 0.5)
    with pytest.raises(CirError, match="cosine"):
        slerp_weights(1.5, 0.5)


def test_which_methods_take_an_alpha() -> None:
    assert {name for name in METHODS if takes_alpha(name)} == {"nlerp", "slerp", "score_fusion"}
