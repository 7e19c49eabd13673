"""Merged weights: an adapter folded into its base model, in the form open_clip loads from `local-dir:`."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors.torch import save_file

from cir_core.lora.adapter_files import folder_transaction
from cir_core.lora.attach import TwoTowerModel, has_adapter
from cir_core.lora.attention import fuse_attention
from cir_core.schema import CirError

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"


def merge_adapter(model: TwoTowerModel) -> TwoTowerModel:
    """A copy of `model` with W + (lora_alpha / r) B A as its weights: a plain open_clip model again.

    No PEFT wrapper, attention fused, the base model's parameter names, eval mode. `model` itself keeps its
    adapter and can go on training. A model without an adapter comes back as a plain copy.
    """
    merged = copy.deepcopy(model)
    if has_adapter(merged):
        merged.visual = merged.visual.merge_and_unload(safe_merge=True)
    fuse_attention(merged)  # both towers: an encoder in bf16 has the text tower's split, too
    return merged.requires_grad_(False).eval()


def export_merged(
    model: TwoTowerModel,
    folder: str | Path,
    *,
    model_cfg: Mapping[str, Any],
    tokenizer: HFTokenizer | SimpleTokenizer,
    overwrite: bool = False,
) -> None:
    """Write `model`, merged, as open_clip_config.json + open_clip_model.safetensors + tokenizer files.

    `open_clip.create_model_and_transforms("local-dir:<folder>")` and
    `open_clip.get_tokenizer("local-dir:<folder>")` then give the same image and text embeddings (1e-5). The
    folder appears whole or not at all.
    model_cfg: the configuration the model was built from, with quick_gelu as it was built
    (encoder.model_cfg).
    tokenizer: the model's own. A SimpleTokenizer ships inside open_clip and adds no files.
    Raises CirError for a tokenizer that a folder cannot hold, non-finite weights, and an existing folder
    unless `overwrite`.
    """
    config = {
        "model_cfg": _portable_config(model_cfg, tokenizer),
        "preprocess_cfg": model.visual.preprocess_cfg,
    }
    merged = merge_adapter(model)
    # clone: safetensors refuses tensors that share storage, and towers may tie weights
    tensors = {name: t.detach().to("cpu").contiguous().clone() for name, t in merged.state_dict().items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CirError(f"{name} holds NaN or infinity: the tuning diverged, so there is no model to export")
    with folder_transaction(folder, overwrite=overwrite) as temporary:
        save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        if isinstance(tokenizer, HFTokenizer):
            tokenizer.save_pretrained(str(temporary))
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _portable_config(model_cfg: Mapping[str, Any], tokenizer: object) -> dict[str, Any]:
    """`model_cfg` such that get_tokenizer("local-dir:") picks the same tokenizer class."""
    if "text_cfg" not in model_cfg:
        raise CirError("only open_clip models can be exported in open_clip's form; keep the adapter for a BLIP model")
    config = copy.deepcopy(dict(model_cfg))
    named = config["text_cfg"].get("hf_tokenizer_name")
    if isinstance(tokenizer, HFTokenizer) and not named:
        # open_clip reads tokenizer files only when a name is set; from a local-dir any non-empty name means
        # "this folder".
        config["text_cfg"]["hf_tokenizer_name"] = "local"
    elif isinstance(tokenizer, SimpleTokenizer) and named:
        raise CirError(f"the model's tokenizer is {named!r}, but a SimpleTokenizer was given to export")
    elif not isinstance(tokenizer, HFTokenizer | SimpleTokenizer):
        raise CirError(f"a {type(tokenizer).__name__} cannot be stored in an open_clip local-dir")
    return config
