"""The LoRA layer in few operations is PEFT's: values, gradients, dropout, files; and it keeps less."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from cir_core.lora.linear import LoraLinear, _keep_mask
from cir_core.tuning.saved_tensors import SavedTensors

INPUTS, OUTPUTS, R = 6, 10, 3


def layer(cls=LoraLinear, *, dropout=0.0, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    base = nn.Linear(INPUTS, OUTPUTS, bias=bias).requires_grad_(False)
    config = LoraConfig(r=R, lora_alpha=5, lora_dropout=dropout)
    one = cls(base, "default", config=config, r=R, lora_alpha=5).to(dtype)
    nn.init.normal_(one.lora_B["default"].weight)
    return one


def values_and_gradients(one: nn.Module, x: Tensor, *, of_x: bool = True) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(of_x)
    out = one(x)
    out.backward(torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape))
    found = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
    return {**found, "out": out.detach(), **({"x": x.grad} if of_x else {})}


def inputs(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, INPUTS, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 1, 1)])
def test_values_and_gradients_are_pefts(bias, of_x, shape):
    found, expected = (
        values_and_gradients(layer(cls, bias=bias), inputs(*shape), of_x=of_x) for cls in (LoraLinear, Linear)
    )
    assert (
        found.keys()
        == expected.keys()
        == {"lora_A.default.weight", "lora_B.default.weight", "out"} | ({"x"} if of_x else set())
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-12, rtol=1e-12)


def test_an_input_that_is_not_contiguous():
    x = inputs(4, 5).transpose(0, 1)
    found, expected = (values_and_gradients(layer(cls), x) for cls in (LoraLinear, Linear))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-12, rtol=1e-12)


def test_dropout_is_that_of_the_definition():
    one = layer(dropout=0.4)
    x = inputs(3, 20)
    torch.manual_seed(9)
    found = values_and_gradients(one, x)
    torch.manual_seed(9)
    mask, keep = _keep_mask(x.view(-1, INPUTS), 0.4)
    assert keep == pytest.approx(0.6, abs=1e-5)
    leaf = x.clone().requires_grad_()
    a, b = (one.get_parameter(f"lora_{name}.default.weight") for name in "AB")
    a.grad = b.grad = None
    dropped = leaf * mask.view(x.shape) / keep
    out = one.base_layer(leaf) + dropped @ a.T @ b.T * 5 / R
    out.backward(torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape))
    expected = {"out": out.detach(), "x": leaf.grad, "lora_A.default.weight": a.grad, "lora_B.default.weight": b.grad}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-12, rtol=1e-12)
    one.eval()
    torch.testing.assert_close(one(x), layer(Linear)(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.93])
def test_each_value_is_kept_with_its_probability_on_its_own(dropout):
    torch.manual_seed(3)
    mask, keep = _keep_mask(torch.empty(1001, 401), dropout)  # an odd number of values: the last draw is cut
    assert keep == pytest.approx(1 - dropout, abs=1e-5)
    flat = mask.flatten()
    sigma = (keep * (1 - keep) / len(flat)) ** 0.5
    assert abs(flat.double().mean().item() - keep) < 5 * sigma
    for lane in range(4):  # one draw decides about four
        assert abs(flat[lane::4].double().mean().item() - keep) < 10 * sigma
        both = (flat[:-lane] & flat[lane:]) if lane else flat
        expected = keep**2 if lane else keep
        assert abs(both.double().mean().item() - expected) < 10 * sigma
    assert not torch.equal(mask, _keep_mask(mask, dropout)[0])
    torch.manual_seed(3)
    assert torch.equal(mask, _keep_mask(mask, dropout)[0])


def test_under_autocast_as_peft_to_its_rounding():
    x = inputs(8, dtype=torch.float32)
    found = []
    for cls in (LoraLinear, Linear):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(values_and_gradients(layer(cls, dtype=torch.float32), x))
    assert found[0]["out"].dtype == found[1]["out"].dtype == torch.bfloat16
    exact = values_and_gradients(layer(), x.double())
    for name, value in exact.items():
        assert found[0][name].dtype == found[1][name].dtype
        ours, theirs = ((one[name].double() - value).norm() / value.norm() for one in found)
        assert ours < max(2 * theirs, 0.01)


def test_what_is_not_plain_lora_goes_pefts_way():
    x = inputs(4)
    one, other = layer(), layer(Linear)
    one.enable_adapters(False)
    torch.testing.assert_close(one(x), one.base_layer(x))
    one.enable_adapters(True)
    before = one(x)
    one.merge()
    torch.testing.assert_close(one(x), before, atol=1e-12, rtol=1e-12)
    one.unmerge()
    for each in (one, other):
        each.base_layer.requires_grad_(True)
    found, expected = (values_and_gradients(each, x) for each in (one, other))
    assert "base_layer.weight" in found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-12, rtol=1e-12)


def test_two_layers_keep_their_input_once_and_a_byte_of_mask_for_a_value():
    kept = []
    for cls in (LoraLinear, Linear):
        layers = [layer(cls, dropout=0.1, dtype=torch.float32) for _ in range(2)]
        x = inputs(1000, dtype=torch.float32).requires_grad_() * 1  # not a leaf, as between two layers
        with SavedTensors([p for one in layers for p in one.parameters()]) as saved:
            out = layers[0](x).sum() + layers[1](x).sum()
        kept.append(saved.peak_bytes)
        del out
        assert saved.bytes_now == 0
    values = 1000 * INPUTS
    masks_on_a_draws_storage = 2 * values
    assert kept[0] <= 4 * values + masks_on_a_draws_storage + 2 * 4 * 1000 * R + 64
    assert kept[1] >= 16 * values  # PEFT's: two dropped copies and two masks of floats
