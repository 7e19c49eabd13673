"""Text-Anchored-Tuning, the training step: LoRA on the image tower pulls images towards frozen text embeddings.

Pure torch, one process of W: the job hands in the gather across processes and the wrapper that averages gradients
(DistributedDataParallel). Everything random in a step is seeded by the step itself, so an interrupted run that goes on
from its state ends in the same weights as one that was never interrupted.

The text tower is frozen, so a caption's embedding never changes: a step takes captions, or anchors made from them
before (`encode_texts`), and a tuner that is given anchors needs no text tower.

Source: arXiv 2405.00571, section 4. Loss, temperature, LoRA, AdamW and learning rate are the paper's; weight decay,
warm-up, schedule and clipping are not published and are settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cir_core.losses import Gather, contrastive_loss
from cir_core.schema import CirError

if TYPE_CHECKING:
    from cir_core.encoders.two_tower import OpenClipEncoder


_NORM_TOLERANCE = 1e-3  # as the embedding store's: rounding is far below, a missing normalisation far above


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """What a step needs to know. lr: peak; warmup_steps: linear from zero, then a cosine to zero at total_steps.

    max_grad_norm: gradients are scaled down to this norm, 0 = never. precision: "fp32" or "bf16" (autocast).
    """

    total_steps: int
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    temperature: float = 0.07
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    seed: int = 0


class _ImageTower(nn.Module):
    """The image tower as the module that is trained: pixels in, unit embeddings out."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.visual(pixels).float(), dim=-1)


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
        if settings.gradient_checkpointing:
            encoder.model.visual.set_grad_checkpointing(True)
        self.tower = wrap(_ImageTower(encoder.model.visual))
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=settings.lr, weight_decay=settings.weight_decay)

    def learning_rate(self, step: int) -> float:
        """Return the rate of step 0 .. total_steps - 1: linear warm-up, then half a cosine."""
        settings = self.settings
        if step < settings.warmup_steps:
            return settings.lr * (step + 1) / (settings.warmup_steps + 1)
        done = (step - settings.warmup_steps) / max(1, settings.total_steps - settings.warmup_steps)
        return settings.lr * 0.5 * (1 + math.cos(math.pi * done))

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

    def _anchors(self, texts: list[str] | Tensor, valid: Tensor) -> Tensor:
        """Return float32[B, D] on the device: the captions' embeddings, or the given ones, checked."""
        if not isinstance(texts, Tensor):
            if not self.has_text_tower:
                raise CirError("this tuner's text tower was dropped: give it anchors, float32[B, D], not captions")
            return self.encoder.encode_texts(texts)
        expected = (len(valid), self.encoder.dim)
        norms = texts[valid].norm(dim=-1) if texts.shape == expected and texts.dtype == torch.float32 else None
        if norms is None or not bool(((norms - 1).abs() <= _NORM_TOLERANCE).all()):
            raise CirError(
                f"text anchors must be float32{list(expected)} of unit norm, found {texts.dtype}{list(texts.shape)}"
                + ("" if norms is None else f" with norms from {float(norms.min()):.4g} to {float(norms.max()):.4g}")
            )
        return texts.to(self.encoder.device, non_blocking=True)

    def loss(self, images: Tensor, texts: list[str] | Tensor, valid: Tensor) -> Tensor:
        """Return this process's share of the global loss; see `losses.contrastive_loss`.

        Args:
            images: uint8[B, 3, H, W], already resized and cropped.
            texts: B captions, or their embeddings float32[B, D] of unit norm; no gradient flows to them.
            valid: bool[B], False for placeholder rows, whose text may be anything.

        Raises:
            CirError: embeddings of another shape, type or norm; captions after `drop_text_tower`.
        """
        with torch.no_grad():
            text_BD = self._anchors(texts, valid)
            pixels = self.encoder.normalize(images)
        device = self.encoder.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bf16"):
            image_BD = self.tower(pixels)
        return contrastive_loss(
            image_BD,
            text_BD,
            self.settings.temperature,
            gather=self.gather,
            rank=self.rank,
            valid=valid.to(device),
        )

    def step(self, index: int, images: Tensor, texts: list[str] | Tensor, valid: Tensor) -> StepResult:
        """Do optimiser step `index` (0-based over the whole run) on this process's part of the global batch.

        The rest is as in `loss`.
        """
        torch.manual_seed(hash((self.settings.seed, index, self.rank)) & 0x7FFFFFFF)  # dropout; a hash of ints is fixed
        self.tower.train()
        loss = self.loss(images, texts, valid)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = self.settings.max_grad_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(list(self.trainable.values()), limit)
        lr = self.learning_rate(index)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.tower.eval()
        return StepResult(loss.detach(), grad_norm.detach(), lr)

    def state_bytes(self, metadata: dict[str, Any]) -> bytes:
        """Return adapter, optimiser moments and `metadata` as one safetensors file: nothing in it can run code."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        data: bytes = save(tensors, {"tuning": json.dumps(metadata)})
        return data

    def load_state(self, path: str) -> dict[str, Any]:
        """Restore what `state_bytes` wrote, from a local file, and return its metadata.

        Raises:
            CirError: the file belongs to another adapter (names or shapes differ).
        """
        with safe_open(path, framework="pt") as handle:
            names = set(handle.keys())
            wanted = {f"parameter/{name}" for name in self.trainable}
            if wanted != {name for name in names if name.startswith("parameter/")}:
                raise CirError(f"{path} is the state of another adapter: its parameters differ from this model's")
            with torch.no_grad():
                for name, parameter in self.trainable.items():
                    parameter.copy_(handle.get_tensor(f"parameter/{name}"))
                    keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in names]
                    if keys:
                        self.optimizer.state[parameter] = {
                            key: handle.get_tensor(f"{key}/{name}").to("cpu" if key == "step" else parameter.device)
                            for key in keys
                        }
            metadata: dict[str, Any] = json.loads((handle.metadata() or {}).get("tuning", "{}"))
            return metadata
