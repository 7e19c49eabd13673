"""QuickGELU, x * sigmoid(1.702 x), of OpenAI's CLIP weights, keeping its input alone for the backward pass.

open_clip writes it as three operations, of which autograd keeps two results as large as the MLP's hidden layer: a quarter
of all that a training step keeps. The outputs are the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SLOPE = 1.702


class LeanQuickGELU(nn.Module):
    """open_clip's QuickGELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every value."""
        out: Tensor = _QuickGELU.apply(x)
        return out


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.mul(x, _SLOPE).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # x sigmoid(c x) = silu(c x) / c, whose slope is that of silu at c x
        result: Tensor = torch.ops.aten.silu_backward(grad, torch.mul(x, _SLOPE))
        return result
