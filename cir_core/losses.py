"""The symmetric contrastive loss over the global batch, and the gather that makes a batch global.

Each rank scores its own rows against everybody's: image -> text and text -> image, so no rank builds the
whole [W*B, W*B] matrix. The mean over the ranks of the returned loss is the loss of the global batch, and the
mean over the ranks of its gradients (what DistributedDataParallel computes) is that loss's gradient, exactly.

Shapes: B rows on this rank, W ranks, D embedding dimensions. Every rank must hold the same B: give a row that
could not be read a placeholder and mark it in `valid`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cir_core.schema import CirError

Gather = Callable[[Tensor], Tensor]


def contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    temperature: float | Tensor,
    *,
    gather: Gather | None = None,
    rank: int = 0,
    valid: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE of matched rows (CLIP, arXiv 2103.00020, figure 3).

    The mean of the cross entropies image -> text and text -> image.

    image_BD, text_BD: floating point [B, D], unit norm, row i of one belongs to row i of the other. Computed
    in float32, also under autocast.
    temperature: positive number or 0-d tensor; logits are cosines divided by it (0.07 is a logit scale of
    14.29).
    gather: differentiable [B, C] -> [W*B, C], rank-major, whose backward sums the gradients of all ranks
    (`all_gather_with_grad`); None is a single process. `rank` is this process's place in what it returns.
    valid: bool[B]; rows that are False are neither anchors nor negatives and receive zero gradient, whatever
    they hold.
    Returns a float32 scalar: this rank's sum over its valid rows * W / (valid rows of all ranks), zero if
    there are none.
    Raises CirError for shapes that disagree or a temperature that is not positive.
    """
    valid_B = _check(image_BD, text_BD, temperature, valid)
    batch, dim = image_BD.shape
    with torch.autocast(image_BD.device.type, enabled=False):
        image = image_BD.float().masked_fill(~valid_B[:, None], 0.0)
        text = text_BD.float().masked_fill(~valid_B[:, None], 0.0)
        local = torch.cat([image, text, valid_B[:, None].float()], dim=1)  # one collective instead of three
        gathered = local if gather is None else gather(local)
        num_ranks = _num_ranks(gathered, batch, rank)
        all_image, all_text, all_valid = gathered[:, :dim], gathered[:, dim:-1], gathered[:, -1]
        exists = all_valid.detach() > 0.5
        target = torch.arange(batch, device=image.device) + rank * batch
        image_to_text = _cross_entropy(image @ all_text.T / temperature, target, valid_B, exists)
        text_to_image = _cross_entropy(text @ all_image.T / temperature, target, valid_B, exists)
        return (image_to_text + text_to_image).sum() / 2 * num_ranks / exists.sum().clamp(min=1)


def _cross_entropy(logits: Tensor, target: Tensor, anchor: Tensor, exists: Tensor) -> Tensor:
    """Cross entropy [B], zero where `anchor` is False; columns where `exists` is False take no part."""
    logits = logits.masked_fill(~exists, -torch.inf)
    # A row of -inf has no softmax: rows that are no anchors become constants, which carry no gradient.
    logits = logits.masked_fill(~anchor[:, None], 0.0)
    return F.cross_entropy(logits, target, reduction="none") * anchor


def _check(image: Tensor, text: Tensor, temperature: float | Tensor, valid: Tensor | None) -> Tensor:
    if image.ndim != 2 or image.shape != text.shape or not image.is_floating_point():
        raise CirError(f"contrastive_loss: image {list(image.shape)} and text {list(text.shape)} must be float [B, D]")
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise CirError(f"contrastive_loss: temperature must be one number, got shape {list(temperature.shape)}")
    elif not 0 < temperature < float("inf"):
        raise CirError(f"contrastive_loss: temperature must be positive, got {temperature}; the paper's is 0.07")
    if valid is None:
        return torch.ones(len(image), dtype=torch.bool, device=image.device)
    if valid.dtype != torch.bool or valid.shape != image.shape[:1]:
        raise CirError(f"contrastive_loss: valid must be bool[{len(image)}], got {valid.dtype} {list(valid.shape)}")
    return valid.to(image.device)


def _num_ranks(gathered: Tensor, batch: int, rank: int) -> int:
    num_ranks = len(gathered) // max(batch, 1)
    if batch == 0 or len(gathered) != num_ranks * batch or not 0 <= rank < num_ranks:
        raise CirError(
            f"contrastive_loss: rank {rank} with {batch} rows gathered {len(gathered)} rows; every rank needs "
            "the same number of rows, at least one, and rank must be this process's place among them"
        )
    return num_ranks


class _AllGather(torch.autograd.Function):
    """Concatenate over ranks; backward sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        out = tensor.new_empty((dist.get_world_size(group) * tensor.shape[0], *tensor.shape[1:]))
        dist.all_gather_into_tensor(out, tensor.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        out = grad.new_empty((grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:]))
        dist.reduce_scatter_tensor(out, grad.contiguous(), op=dist.ReduceOp.SUM, group=ctx.group)
        return out, None


def all_gather_with_grad(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[B, ...] of every rank -> [W*B, ...], rank-major and differentiable.

    A collective: every rank calls it, with equal shapes.

    Backward adds up the gradients of all ranks (a reduce-scatter), so every rank must also run backward
    through it.
    Raises CirError where torch.distributed was not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise CirError(
            "all_gather_with_grad: torch.distributed is not initialised; pass gather=None in a single process"
        )
    result: Tensor = _AllGather.apply(tensor, group)
    return result
