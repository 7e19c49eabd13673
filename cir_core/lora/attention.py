"""Fused attention, taken apart and put back together: LoRA needs q, k and v as linear layers of their own.

open_clip keeps q, k and v in one `in_proj_weight` of nn.MultiheadAttention, timm and BLIP in one `qkv`
Linear; an adapter cannot be put on a third of a matrix, and on MultiheadAttention's `out_proj` it would never
run (the layer is read, not called). `split_attention` replaces both in place, with the same outputs;
`fuse_attention` restores the original modules and names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cir_core.schema import CirError

# Attentions of timm and transformers that call `self.qkv(x)` and read the result as (q, k, v) along the last
# axis. Others interleave the heads (maxxvit) or give k and v other widths (levit): a third of their qkv is
# not "q", so they stay as they are.
QKV_CLASSES = frozenset(
    {
        "timm.layers.attention.Attention",
        "timm.layers.attention.AttentionRope",
        "timm.models.eva.EvaAttention",
        "timm.models.fastvit.Attention",
        "timm.models.swin_transformer.WindowAttention",
        "timm.models.vision_transformer_relpos.RelPosAttention",
        "transformers.models.blip.modeling_blip.BlipAttention",
    }
)


class SplitAttention(nn.Module):
    """nn.MultiheadAttention with separate q_proj, k_proj, v_proj, out_proj, called the way open_clip's blocks
    call it.

    Equal to the fused module to float32 rounding. Attention weights are not returned, key padding masks not
    supported.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        if fused.bias_k is not None or fused.add_zero_attn:
            raise CirError("cannot split an attention with add_bias_kv or add_zero_attn: no open_clip model has one")
        self.embed_dim, self.num_heads = fused.embed_dim, fused.num_heads
        self.dropout, self.batch_first = fused.dropout, fused.batch_first
        # The packed matrix and the three separate ones (a pooler whose keys have another width) become the
        # same thing.
        weights = (
            fused.in_proj_weight.chunk(3)
            if fused.in_proj_weight is not None
            else (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
        )
        biases = fused.in_proj_bias.chunk(3) if fused.in_proj_bias is not None else (None, None, None)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)
        self.train(fused.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend: query [B, L, E], key and value [B, S, *] ([L, B, E] when not batch_first) -> ([B, L, E],
        None).

        attn_mask: bool (True = may NOT attend, as in nn.MultiheadAttention) or added float; [L, S] or [B *
        heads, L, S].
        """
        if need_weights or key_padding_mask is not None:
            raise NotImplementedError("SplitAttention: call it with need_weights=False and without key_padding_mask")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, L, E / heads]
            for projected in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self._mask(attn_mask, query.shape[0]),
            dropout_p=self.dropout if self.training else 0.0,
        )
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _mask(self, attn_mask: Tensor | None, batch_size: int) -> Tensor | None:
        if attn_mask is None:
            return None
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(batch_size, self.num_heads, *attn_mask.shape[1:])
        # The two torch interfaces give a bool mask opposite meanings.
        return ~attn_mask if attn_mask.dtype == torch.bool else attn_mask

    def fuse(self) -> nn.MultiheadAttention:
        """The nn.MultiheadAttention with this module's weights."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        fused = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=self.q_proj.bias is not None,
            kdim=self.k_proj.in_features,
            vdim=self.v_proj.in_features,
            batch_first=self.batch_first,
            device=self.out_proj.weight.device,
            dtype=self.out_proj.weight.dtype,
        )
        with torch.no_grad():
            if fused._qkv_same_embed_dim:
                fused.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
            else:
                for name, projection in zip("qkv", projections, strict=True):
                    getattr(fused, f"{name}_proj_weight").copy_(projection.weight)
            if self.q_proj.bias is not None:
                fused.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
                fused.out_proj.bias.copy_(self.out_proj.bias)
            fused.out_proj.weight.copy_(self.out_proj.weight)
        return fused.train(self.training).requires_grad_(self.out_proj.weight.requires_grad)


class SplitQKV(nn.Module):
    """A `qkv` Linear as q_proj, k_proj, v_proj with concatenated outputs: [..., E] -> [..., 3 * A].

    It has no `weight` on purpose: code that reads weights instead of calling the layer fails instead of
    skipping adapters.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        biases = fused.bias.chunk(3) if fused.bias is not None else (None, None, None)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, fused.weight.chunk(3), biases)
        self.train(fused.training)

    def forward(self, x: Tensor) -> Tensor:
        """Project: [..., E] -> [..., 3 * A] in the order q, k, v."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    def fuse(self) -> nn.Linear:
        """The single Linear with this module's weights."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        bias = torch.cat([p.bias for p in projections]) if self.q_proj.bias is not None else None
        return _linear(torch.cat([p.weight for p in projections]), bias).train(self.training)


def split_attention(tower: nn.Module) -> int:
    """Split every fused attention inside `tower`, in place; returns how many. Outputs stay equal (1e-6)."""
    count = split_multihead_attention(tower)
    for owner, name, child in list(_children(tower)):
        if name == "qkv" and isinstance(child, nn.Linear) and _class_path(owner) in QKV_CLASSES:
            _set_separate_bias(owner, True)
            setattr(owner, name, SplitQKV(child))
            count += 1
    return count


def split_multihead_attention(tower: nn.Module) -> int:
    """Split nn.MultiheadAttention alone, in place; returns how many. Under autocast this is a matter of speed.

    torch's own projects q, k and v with a strided input, which under autocast becomes a batched product with a copy of
    the weights for every row of the batch: a ViT-B-32 is then slower in bfloat16 than in float32, and split three
    times as fast.
    """
    count = 0
    for owner, name, child in list(_children(tower)):
        if isinstance(child, nn.MultiheadAttention):
            setattr(owner, name, SplitAttention(child))
            count += 1
    return count


def fuse_attention(tower: nn.Module) -> int:
    """Undo `split_attention` in place, with the current weights; returns how many modules were put back.

    Raises CirError when an adapter still sits on a projection: merge it first, or it would be lost.
    """
    count = 0
    for owner, name, child in list(_children(tower)):
        if isinstance(child, SplitAttention | SplitQKV):
            for projection in child.children():
                if type(projection) is not nn.Linear:
                    raise CirError(f"cannot fuse {name}: an adapter is still attached; merge it first")
            setattr(owner, name, child.fuse())
            if isinstance(child, SplitQKV):
                _set_separate_bias(owner, False)
            count += 1
    return count


def _set_separate_bias(owner: Any, value: bool) -> None:
    """Make EVA's attention call `qkv` (adding its own q and v biases after) instead of reading its weight."""
    if getattr(owner, "q_bias", None) is None:
        return
    if value and owner.qkv_bias_separate:
        owner.qkv_bias_was_separate = True  # so that fusing leaves the flag as the model had it
    owner.qkv_bias_separate = value or bool(getattr(owner, "qkv_bias_was_separate", False))


def _children(tower: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for owner in tower.modules():
        for name, child in owner.named_children():
            yield owner, name, child


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear with copies of the given weights, so that it shares no storage with the module it replaces."""
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear.requires_grad_(weight.requires_grad)
