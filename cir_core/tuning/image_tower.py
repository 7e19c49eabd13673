"""The image tower as training runs it: normalised outputs, nothing computed in vain, patch dropout if it is asked for."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cir_core.schema import CirError
from cir_core.tuning.quick_gelu import LeanQuickGELU
from cir_core.tuning.settings import TuningSettings


class ImageTower(nn.Module):
    """The image tower as the module that is trained: pixels in, unit embeddings out."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        """float32[B, 3, H, W], normalised -> float32[B, D], unit norm."""
        return F.normalize(self.visual(pixels).float(), dim=-1)


def prepare_tower(visual: Any, settings: TuningSettings) -> ImageTower:
    """Set up an image tower with an adapter for training, in place.

    Raises:
        CirError: patch dropout for a tower that has none.
    """
    from open_clip.transformer import QuickGELU  # here: a driver has no use for open_clip

    from cir_core.lora import last_block_for_class_token

    set_patch_dropout(visual, settings.patch_dropout)
    if settings.gradient_checkpointing:
        visual.set_grad_checkpointing(True)
    last_block_for_class_token(visual)
    for owner in list(visual.modules()):
        for name, child in owner.named_children():
            if type(child) is QuickGELU:
                setattr(owner, name, LeanQuickGELU())
    return ImageTower(visual)


def set_patch_dropout(visual: Any, share: float) -> None:
    """Make training leave out this share of an image's patches (open_clip's module, arXiv 2212.00794); 0 = none.

    In eval mode all patches count. Also turns off what the model's own configuration asks for.

    Raises:
        CirError: a share out of range, or a tower that is not open_clip's VisionTransformer.
    """
    from open_clip.transformer import PatchDropout

    if not 0 <= share < 1:
        raise CirError(f"patch_dropout must be in [0, 1), not {share}")
    tower = visual.get_base_model() if hasattr(visual, "peft_config") else visual
    if not isinstance(getattr(tower, "patch_dropout", None), PatchDropout | nn.Identity):
        if share:
            raise CirError(
                f"patch_dropout {share:g} needs open_clip's VisionTransformer (ViT-B-32, ViT-L-14, ...); this image tower "
                f"is a {type(tower).__name__}: use patch_dropout 0, or another model"
            )
        return
    tower.patch_dropout = (PatchDropout(share) if share else nn.Identity()).train(tower.training)
