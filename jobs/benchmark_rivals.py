"""What a training step is measured against: PEFT's LoRA of nn.MultiheadAttention, and open_clip's trainer; and ours.

All sides start from copies of the same encoder and take the same batch. Shapes: B rows, D embedding dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import create_loss
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn

from cir_core.encoders.two_tower import OpenClipEncoder
from cir_core.lora import attach_lora
from cir_core.losses import contrastive_loss
from cir_core.schema import CirError
from cir_core.tuning import TextAnchoredTuner, TuningSettings
from cir_core.tuning.image_tower import set_patch_dropout

R, LORA_ALPHA, LORA_DROPOUT = 16, 16, 0.1  # the paper's, and on PEFT's side the same


@dataclass(frozen=True)
class Batch:
    """What every step of a measurement takes: images uint8[B, 3, H, W], their captions, and those as anchors [B, D]."""

    images: Tensor
    captions: list[str]
    anchors: Tensor
    valid: Tensor


def make_batch(encoder: OpenClipEncoder, batch_size: int) -> Batch:
    """Make random pictures with captions."""
    size = encoder.preprocessing.size
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
    captions = [f"a red circle above two small squares, number {number}" for number in range(batch_size)]
    valid = torch.ones(batch_size, dtype=torch.bool)
    return Batch(images, captions, encoder.encode_texts(captions).cpu(), valid)


def make_tuner(encoder: OpenClipEncoder, settings: TuningSettings) -> TextAnchoredTuner:
    """Attach our LoRA to a copy of the encoder's model, as tat_train does, and make its tuner."""
    own = copy.deepcopy(encoder)
    torch.manual_seed(settings.seed)
    attach_lora(own.model, r=R, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT)
    own.model.to(own.device)
    return TextAnchoredTuner(own, settings)


def peft_encoder(encoder: OpenClipEncoder) -> OpenClipEncoder:
    """Return a copy whose image tower has PEFT's own LoRA on its nn.MultiheadAttention modules, which it wraps whole.

    Raises:
        CirError: the image tower has none.
    """
    if not any(isinstance(module, nn.MultiheadAttention) for module in encoder.model.visual.modules()):
        raise CirError(
            f"training_peft: the image tower of {encoder.details.model!r} has no nn.MultiheadAttention, which PEFT's path "
            "is made for; measure one of open_clip's VisionTransformers (ViT-B-32, ViT-L-14, ...)"
        )
    own = copy.deepcopy(encoder)
    config = LoraConfig(r=R, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT, target_modules=["attn"])
    own.model.visual = get_peft_model(own.model.visual, config)
    own.model.to(own.device)
    return own


class PlainStep:
    """The step one writes around a PEFT model: loss, optimiser and clipping as in ours, open_clip's blocks as they are."""

    def __init__(self, encoder: OpenClipEncoder, settings: TuningSettings) -> None:
        self.encoder, self.settings = encoder, settings
        set_patch_dropout(encoder.model.visual, settings.patch_dropout)
        self.trainable = [one for one in encoder.model.visual.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=settings.lr, weight_decay=settings.weight_decay)

    def embed(self, images: Tensor) -> Tensor:
        """uint8[B, 3, H, W] -> float32[B, D], unit norm, with a graph."""
        enabled = self.settings.precision == "bf16"
        with torch.autocast(self.encoder.device.type, dtype=torch.bfloat16, enabled=enabled):
            features = self.encoder.model.visual(self.encoder.normalize(images))
        unit: Tensor = F.normalize(features.float(), dim=-1)
        return unit

    def step(self, images: Tensor, anchors: Tensor) -> Tensor:
        """Do one optimiser step on uint8[B, 3, H, W] and float32[B, D]; return the loss."""
        self.encoder.model.visual.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = contrastive_loss(self.embed(images), anchors.to(self.encoder.device), self.settings.temperature)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.trainable, self.settings.max_grad_norm)
        self.optimizer.step()
        return loss.detach()


def attention_weights(encoder: OpenClipEncoder) -> list[Tensor]:
    """Return copies of the frozen input projections below PEFT's layers."""
    found = [module.base_layer for module in encoder.model.visual.modules() if isinstance(module, MultiheadAttention)]
    return [layer.in_proj_weight.detach().clone() for layer in found]


class InMemoryLoader:
    """What open_clip_train asks of its data: one batch, again and again, for an epoch of `num_batches` steps."""

    def __init__(self, images: Tensor, tokens: Tensor, num_batches: int) -> None:
        self.images, self.tokens, self.num_batches = images, tokens, num_batches
        self.num_samples = num_batches * len(images)
        self.dataloader = self

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.num_batches):
            yield self.images, self.tokens

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: every epoch is the same."""


def open_clip_epoch(
    encoder: OpenClipEncoder, settings: TuningSettings, batch: Batch, *, steps: int, adapted: bool
) -> Callable[[], None]:
    """Return open_clip_train's epoch of `steps` steps on a copy of the encoder, set up as its main does; text tower locked.

    adapted: PEFT's LoRA on the image tower, and that alone is trained; else the whole image tower.
    """
    from open_clip_train.params import parse_args
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    given = {
        "--model": encoder.details.model,
        "--batch-size": len(batch.images),
        "--precision": "amp_bf16" if settings.precision == "bf16" else "fp32",
        "--device": encoder.device,
        "--lr": settings.lr,
        "--wd": settings.weight_decay,
        "--grad-clip-norm": settings.max_grad_norm,
    }
    args = parse_args(
        [str(word) for item in given.items() for word in item] + ["--lock-text", "--lock-text-freeze-layer-norm"]
    )
    args.rank, args.local_rank, args.world_size = 0, 0, 1  # from here on as its main does, for one process
    args.distributed = args.distill = args.wandb = False
    model = (peft_encoder(encoder) if adapted else copy.deepcopy(encoder)).model
    model.output_dict = True
    set_patch_dropout(model.visual, settings.patch_dropout)
    if not adapted:
        model.requires_grad_(True)
    model.logit_scale.requires_grad_(True)
    model.lock_text_tower(args.lock_text_unlocked_layers, args.lock_text_freeze_layer_norm)
    optimizer = _open_clip_optimizer(model, args)
    loader = InMemoryLoader(encoder.normalize(batch.images).cpu(), encoder.tokenize(batch.captions), steps)
    scheduler, loss = cosine_lr(optimizer, args.lr, args.warmup, settings.total_steps), create_loss(args)
    return partial(train_one_epoch, model, {"train": loader}, loss, 0, optimizer, None, scheduler, None, args)


def _open_clip_optimizer(model: nn.Module, args: Any) -> torch.optim.Optimizer:
    """Return the AdamW of open_clip_train's main: gains and biases without weight decay."""
    groups: tuple[list[Any], list[Any]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
            groups[not no_decay].append(parameter)
    decayed = [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": args.wd}]
    return torch.optim.AdamW(decayed, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps)
