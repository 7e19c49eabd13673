"""The tuner: its parameters, its optimiser, and the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cir_core.losses import Gather, contrastive_loss
from cir_core.schema import CirError
from cir_core.tuning.gradient_cache import backward_in_micro_batches, micro_batches
from cir_core.tuning.image_tower import prepare_tower
from cir_core.tuning.settings import TuningSettings
from cir_core.tuning.state import load_state, state_bytes

if TYPE_CHECKING:
    from cir_core.encoders.two_tower import OpenClipEncoder


_NORM_TOLERANCE = 1e-3  # as the embedding store's: rounding is far below, a missing normalisation far above


@dataclass(frozen=True)
class StepResult:
    """loss: this process's share, the mean over processes is the global loss; grad_norm before clipping; lr used."""

    loss: Tensor
    grad_norm: Tensor
    lr: float


class TextAnchoredTuner:
    """Trains the LoRA parameters of an encoder whose image tower has an adapter attached (`lora.attach_lora`)."""

    def __init__(
        self,
        encoder: OpenClipEncoder,
        settings: TuningSettings,
        *,
        rank: int = 0,
        gather: Gather | None = None,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.encoder, self.settings, self.rank, self.gather = encoder, settings, rank, gather
        self.has_text_tower = True
        self.trainable = {
            name: parameter for name, parameter in encoder.model.named_parameters() if parameter.requires_grad
        }
        outside = [name for name in self.trainable if not name.startswith("visual.")]
        if not self.trainable or outside:
            raise CirError(
                f"TAT trains an adapter of the image tower and nothing else; "
                f"{'trainable outside it: ' + ', '.join(outside) if outside else 'no adapter is attached'}"
            )
        self.tower = wrap(prepare_tower(encoder.model.visual, settings))
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=settings.lr, weight_decay=settings.weight_decay)

    def drop_text_tower(self) -> None:
        """Free the memory of everything but the image tower; from now on the tuner takes ready anchors only.

        The other weights become shapes without content, so the model can neither encode texts nor be exported any more.
        """
        model = self.encoder.model
        visual = model.visual
        model.visual = nn.Identity()
        model.to("meta")
        model.visual = visual
        self.has_text_tower = False

    def loss(self, images: Tensor, texts: list[str] | Tensor, valid: Tensor) -> Tensor:
        """Return this process's share of the global loss, with the graph of the whole batch; `step` needs less memory.

        Args:
            images: uint8[B, 3, H, W], already resized and cropped.
            texts: B captions, or their embeddings float32[B, D] of unit norm; no gradient flows to them.
            valid: bool[B], False for placeholder rows, whose text may be anything.

        Raises:
            CirError: embeddings of another shape, type or norm; captions after `drop_text_tower`.
        """
        text_BD = self._anchors(texts, valid)
        return self._loss_of(self._embed(images), text_BD, valid)

    def backward(self, index: int, images: Tensor, texts: list[str] | Tensor, valid: Tensor) -> Tensor:
        """Add the gradients of step `index` to the trainable parameters, in micro-batches; return the loss, detached.

        Dropout is that of the step, of this process and of the micro-batch. The rest is as in `loss`.
        """
        text_BD = self._anchors(texts, valid)
        images = images.to(self.encoder.device, non_blocking=True)  # bytes: a thousandth of the activations

        def embed(rows: slice) -> Tensor:
            self._seed(index, rows)
            return self._embed(images[rows])

        no_sync: Callable[[], AbstractContextManager[object]] = getattr(self.tower, "no_sync", nullcontext)
        rows = micro_batches(len(images), self.settings.micro_batch_size)
        return backward_in_micro_batches(
            embed, lambda image_BD: self._loss_of(image_BD, text_BD, valid), rows, no_sync=no_sync
        )

    def step(self, index: int, images: Tensor, texts: list[str] | Tensor, valid: Tensor) -> StepResult:
        """Do optimiser step `index` (0-based over the whole run) on this process's part of the global batch.

        The rest is as in `loss`.
        """
        self.tower.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward(index, images, texts, valid)
        limit = self.settings.max_grad_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(list(self.trainable.values()), limit)
        lr = self.settings.learning_rate(index)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.tower.eval()
        return StepResult(loss, grad_norm.detach(), lr)

    def state_bytes(self, metadata: dict[str, Any]) -> bytes:
        """Return adapter, optimiser moments and `metadata` as one safetensors file."""
        return state_bytes(self.trainable, self.optimizer, metadata)

    def load_state(self, path: str) -> dict[str, Any]:
        """Restore what `state_bytes` wrote, from a local file, and return its metadata.

        Raises:
            CirError: the file belongs to another adapter.
        """
        return load_state(path, self.trainable, self.optimizer)

    def _seed(self, index: int, rows: slice) -> None:
        """Seed dropout by run, step, process and, from the second on, micro-batch. A hash of ints is fixed."""
        further = (rows.start,) if rows.start else ()
        torch.manual_seed(hash((self.settings.seed, index, self.rank, *further)) & 0x7FFFFFFF)

    def _embed(self, images: Tensor) -> Tensor:
        """uint8[B, 3, H, W] -> float32[B, D], unit norm."""
        with torch.no_grad():
            pixels = self.encoder.normalize(images)
        enabled = self.settings.precision == "bf16"
        with torch.autocast(self.encoder.device.type, dtype=torch.bfloat16, enabled=enabled):
            image_BD: Tensor = self.tower(pixels)
        return image_BD

    def _loss_of(self, image_BD: Tensor, text_BD: Tensor, valid: Tensor) -> Tensor:
        return contrastive_loss(
            image_BD,
            text_BD,
            self.settings.temperature,
            gather=self.gather,
            rank=self.rank,
            valid=valid.to(self.encoder.device),
        )

    def _anchors(self, texts: list[str] | Tensor, valid: Tensor) -> Tensor:
        """Return float32[B, D] on the device, without a graph: the captions' embeddings, or the given ones, checked."""
        if not isinstance(texts, Tensor):
            if not self.has_text_tower:
                raise CirError("this tuner's text tower was dropped: give it anchors, float32[B, D], not captions")
            parts = micro_batches(len(texts), self.settings.micro_batch_size)
            return torch.cat([self.encoder.encode_texts(texts[rows]) for rows in parts])
        expected = (len(valid), self.encoder.dim)
        norms = texts[valid].norm(dim=-1) if texts.shape == expected and texts.dtype == torch.float32 else None
        if norms is None or not bool(((norms - 1).abs() <= _NORM_TOLERANCE).all()):
            raise CirError(
                f"text anchors must be float32{list(expected)} of unit norm, found {texts.dtype}{list(texts.shape)}"
                + ("" if norms is None else f" with norms from {float(norms.min()):.4g} to {float(norms.max()):.4g}")
            )
        return texts.to(self.encoder.device, non_blocking=True).detach()
