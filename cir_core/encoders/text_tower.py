"""The text tower without the padding: captions are a dozen tokens, and a tower made for 77 computes all of them.

In CLIP's text tower a token sees those before it and no later one, and the embedding is read at the end-of-text token
(arXiv 2103.00020, section 2.4).
What stands behind the longest text of a batch therefore decides nothing and is cut off before the tower runs.
"""

from __future__ import annotations

import torch
from open_clip.model import CLIP
from torch import Tensor

from cir_core.lora import TwoTowerModel

_MULTIPLE = 8  # lengths that a GPU's matrix units like, and few different ones


def encode_tokens(model: TwoTowerModel, tokens: Tensor) -> Tensor:
    """int64[B, L] on the model's device -> [B, D], not normalised, in the type that the model computes in.

    `model.encode_text`, equal to rounding; exactly that for towers that read the padding. B is at least 1.
    """
    causal = type(model) is CLIP and model.attn_mask is not None  # open_clip has this one mask, or none
    if not causal or model.text_pool_type not in ("argmax", "eos"):
        features: Tensor = model.encode_text(tokens, normalize=False)
        return features
    ends = tokens.argmax(dim=-1) if model.text_pool_type == "argmax" else (tokens == model.text_eos_id).int().argmax(-1)
    length = min(-(-(int(ends.max()) + 1) // _MULTIPLE) * _MULTIPLE, tokens.shape[1])
    dtype = model.transformer.get_cast_dtype()
    x_BLW = model.token_embedding(tokens[:, :length]).to(dtype) + model.positional_embedding[:length].to(dtype)
    x_BLW = model.transformer(x_BLW, attn_mask=model.attn_mask[:length, :length])
    x_BW: Tensor = model.ln_final(x_BLW)[torch.arange(len(tokens), device=tokens.device), ends]
    projection = model.text_projection
    if projection is None:
        return x_BW
    projected: Tensor = projection(x_BW) if isinstance(projection, torch.nn.Linear) else x_BW @ projection
    return projected
