"""PEFT's LoRA layer for a frozen Linear, the same function in fewer operations and with less kept for the backward pass.

PEFT's own forward makes, for every adapted layer, a dropped copy of the input, the low-rank product, a scaled copy of that
and a sum, and autograd keeps the copy and the mask. Here the scale is part of the matrix products, and what is kept is the
input itself, which q and v share, and one byte of mask per value. Parameters, their names and saved files are PEFT's.

Shapes: N rows (all leading axes together), I and O the layer's inputs and outputs, r the rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LANES = 1 << 16  # values of the 16 random bits that decide about one element on a CPU


class LoraLinear(Linear):  # type: ignore[misc]
    """x W^T + bias + scaling * dropout(x) A^T B^T; falls back to PEFT's forward for what is not plain, frozen LoRA."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., I] -> [..., O], in autocast's type where that is on."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        base = self.get_base_layer()
        plain = len(active) == 1 and not (args or kwargs or self.merged or self.disable_adapters or self.lora_variant)
        if not plain or self.lora_bias[active[0]] or base.weight.requires_grad:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        (name,) = active
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        dropout = self.lora_dropout[name]
        out: Tensor = _LoraProduct.apply(
            x.to(dtype),
            base.weight.to(dtype),
            None if base.bias is None else base.bias.to(dtype),
            self.lora_A[name].weight.to(dtype),
            self.lora_B[name].weight.to(dtype),
            self.scaling[name],
            dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0,
        )
        return out


class _LoraProduct(torch.autograd.Function):
    """The layer's function of x, A and B; weight and bias get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        mask, keep = _keep_mask(x_NI, dropout) if dropout else (None, 1.0)
        ctx.scaling = scaling / keep  # what dropout leaves is scaled up; here, where there are r columns instead of I
        low_Nr = _masked(x_NI, mask) @ a.T
        out_NO = F.linear(x_NI, weight, bias).addmm_(low_Nr, b.T, alpha=ctx.scaling)
        ctx.save_for_backward(x_NI, weight, a, b, mask, low_Nr)
        ctx.shape = x.shape
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight, a, b, mask, low_Nr = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_low_Nr = (grad_NO @ b).mul_(ctx.scaling)
        grad_b = (grad_NO.T @ low_Nr).mul_(ctx.scaling)
        grad_a = grad_low_Nr.T @ _masked(x_NI, mask)
        grad_x = None
        if ctx.needs_input_grad[0]:
            low_rank = grad_low_Nr @ a
            grad_x = (low_rank if mask is None else _masked(low_rank, mask)).addmm_(grad_NO, weight).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None


def _keep_mask(x: Tensor, dropout: float) -> tuple[Tensor, float]:
    """Return a random bool mask of x's shape and the probability of True in it, which is 1 - dropout (CPU: to 1e-5)."""
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout), 1 - dropout
    # bernoulli_ takes a third of such a layer's time: it draws 32 bits for a value. Here 64 are drawn for four.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    below = min(round(dropout * _LANES), _LANES - 1)
    mask = draws.view(torch.int16)[: x.numel()].view(x.shape) >= below - _LANES // 2
    return mask, 1 - below / _LANES


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x
    # On a CPU a product of mixed types goes through slow code, on a GPU it is one kernel.
    return mask.to(x.dtype).mul_(x) if x.device.type == "cpu" else x * mask
