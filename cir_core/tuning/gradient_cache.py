"""Gradient caching (GradCache, arXiv 2101.06983): a contrastive batch of any size in the memory of a small one.

A contrastive loss needs the embeddings of the whole batch at once, but not the activations that led to them. So every
micro-batch is embedded without a graph, the loss and its gradient with respect to the embeddings are taken once over the
whole (global) batch, and then each micro-batch is embedded again, with a graph, which the cached gradient of its rows is
sent through. The gradients are those of the whole batch, exactly, up to the order of float additions. It costs a second
forward pass of all micro-batches but one: the last keeps its graph from the first pass, so a batch that fits in one
micro-batch costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def micro_batches(num_rows: int, size: int) -> list[slice]:
    """Cut rows 0 .. num_rows - 1 into slices of `size` rows, the last may be shorter; one slice for size 0."""
    size = size or max(1, num_rows)
    return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]


def backward_in_micro_batches(
    embed: Callable[[slice], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    rows: Sequence[slice],
    *,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Add the gradients of loss_of(embeddings of all rows) to the parameters behind `embed`; return the loss, detached.

    Args:
        embed: rows -> their embeddings [n, D], with a graph where gradients are enabled. It is called twice with all
            slices but the last and must answer the same both times: what is random in it is to be seeded by the rows.
        loss_of: embeddings [B, D] of all rows in order -> scalar. In several processes it gathers, so every process
            must have the same number of slices.
        rows: the slices of the batch in order, together 0 .. B - 1.
        no_sync: of DistributedDataParallel; every backward pass but the last runs in it, so that gradients are averaged
            over the processes once.
    """
    *again, last = rows
    with no_sync() if again else nullcontext():
        with torch.no_grad():
            known = [embed(part) for part in again]
        held = embed(last)
        leaf_BD = torch.cat([*known, held.detach()]).requires_grad_()
        loss = loss_of(leaf_BD)
        (gradient_BD,) = torch.autograd.grad(loss, leaf_BD)
        held.backward(gradient_BD[last])  # type: ignore[no-untyped-call]
    del held  # and its graph's remains: the memory is for the next
    for part in again:
        with no_sync() if part is not again[-1] else nullcontext():
            embed(part).backward(gradient_BD[part])  # type: ignore[no-untyped-call]
    return loss.detach()
