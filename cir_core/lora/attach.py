"""LoRA on the image tower: attach and count. Works on open_clip models and needs no Encoder.

Text-Anchored-Tuning freezes the text tower and tunes low-rank updates of the image tower's attention
(arXiv 2405.00571, section 4).
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from cir_core.lora.attention import fuse_attention, split_attention
from cir_core.schema import CirError

if TYPE_CHECKING:
    from peft import LoraConfig

# An nn.Module with an image tower `.visual`, encode_image and encode_text: open_clip's CLIP, CustomTextCLIP,
# CoCa.
TwoTowerModel: TypeAlias = Any


@dataclass(frozen=True)
class LoraReport:
    """What `attach_lora` did. adapted: names of the layers with an adapter; fraction = trainable / total."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]
    adapted: tuple[str, ...]
    trainable: int
    total: int

    @property
    def fraction(self) -> float:
        """Trained share of all parameters, both towers and the adapter; the paper's settings give < 0.005."""
        return self.trainable / self.total


def attach_lora(
    model: TwoTowerModel,
    *,
    r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.1,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
) -> LoraReport:
    """Freeze `model`, split its image tower's attention and put LoRA layers on it, all in place.

    Afterwards `model.visual` is a peft.PeftModel, only LoRA parameters require grad, and outputs are what
    they were (B starts at zero). A starts from torch's global generator: seed it for a reproducible run.
    target_modules: layer names as PEFT matches them, whole or as the end of a dotted path.
    Raises CirError for settings out of range, a model that already has an adapter, a tower with BatchNorm,
    and a target that matches no layer (with the layers there are).
    """
    _check_settings(r, lora_alpha, lora_dropout, target_modules)
    from peft import LoraConfig

    config = LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=list(target_modules))
    adapted = wrap_tower(model, config, target_modules)
    trainable, total = count_parameters(model)
    return LoraReport(r, lora_alpha, lora_dropout, tuple(target_modules), adapted, trainable, total)


def check_lora(
    model: TwoTowerModel,
    *,
    r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.1,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
) -> None:
    """Raise CirError where `attach_lora` would; the model stays as it is, and PEFT, slow to import, is not needed."""
    _check_settings(r, lora_alpha, lora_dropout, target_modules)
    _split_tower(model, target_modules)
    fuse_attention(model.visual)


def _check_settings(r: int, lora_alpha: float, lora_dropout: float, target_modules: Sequence[str]) -> None:
    if isinstance(target_modules, str):
        raise CirError(f"target_modules must be a list of layer names, not a string: use [{target_modules!r}]")
    if r < 1 or lora_alpha <= 0 or not 0 <= lora_dropout < 1:
        raise CirError(
            f"LoRA needs r >= 1, lora_alpha > 0 and 0 <= lora_dropout < 1, not r={r}, "
            f"lora_alpha={lora_alpha}, lora_dropout={lora_dropout}"
        )


def count_parameters(model: TwoTowerModel) -> tuple[int, int]:
    """(parameters that require grad, all parameters), adapters included."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def has_adapter(model: TwoTowerModel) -> bool:
    """Whether the image tower carries an adapter."""
    return hasattr(model.visual, "peft_config")


def weights_digest(model: TwoTowerModel, *, without: str | None = None) -> str:
    """'sha256:...' over the sorted state dict: names, dtypes, shapes and bytes.

    Take it before an adapter is attached, which renames the tower's tensors. without: a name prefix to leave
    out; `without="visual."` digests everything but the image tower, which tuning must leave bit-identical.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if without is None or not name.startswith(without):
            digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def wrap_tower(model: TwoTowerModel, config: LoraConfig, targets: Sequence[str]) -> tuple[str, ...]:
    """Put `config`'s LoRA layers on the image tower; on a refusal the tower is as before."""
    _split_tower(model, targets)
    model.requires_grad_(False)
    training = model.visual.training
    from peft import get_peft_model

    from cir_core.lora.linear import LoraLinear  # imports peft, as this function does

    config._register_custom_module({nn.Linear: LoraLinear})
    model.visual = get_peft_model(model.visual, config).train(training)
    return tuple(
        name.removeprefix("base_model.model.")
        for name, module in model.visual.named_modules()
        if hasattr(module, "lora_A")
    )


def _split_tower(model: TwoTowerModel, targets: Sequence[str]) -> None:
    """Take the image tower's attention apart; on a refusal the tower is as before."""
    if has_adapter(model):
        raise CirError("this model already has an adapter: merge it first (merge_adapter), or load the model anew")
    _refuse_batch_norm(model.visual)
    split_attention(model.visual)
    try:
        _check_targets(model.visual, targets)
    except CirError:
        fuse_attention(model.visual)
        raise


def _refuse_batch_norm(tower: nn.Module) -> None:
    for name, module in tower.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise CirError(
                f"the image tower has BatchNorm ({name}): tuning would change its running statistics, which "
                "an adapter does not hold, so the saved model would not be the tuned one; use a transformer "
                "tower (ViT-B-32, ...)"
            )


def _check_targets(tower: nn.Module, targets: Sequence[str]) -> None:
    """Every target must match a layer. PEFT alone accepts a list of which only one entry matches."""
    layers = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            short = sorted({name.rpartition(".")[2] for name in layers})
            near = difflib.get_close_matches(target, short, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise CirError(
                f"LoRA target {target!r} matches no layer of the image tower{hint} Linear layers available: "
                f"{', '.join(short) or 'none'}"
            )
    if not targets:
        raise CirError("target_modules is empty: name at least one layer, as in ('q_proj', 'v_proj')")
