"""LoRA adapters of the image tower: attach, count, save, load, merge, export.

A target that matches no layer is an error.
"""

from cir_core.lora.adapter_files import TatMetadata, adapter_digest, load_adapter, local_adapter, save_adapter
from cir_core.lora.attach import (
    LoraReport,
    TwoTowerModel,
    attach_lora,
    check_lora,
    count_parameters,
    has_adapter,
    weights_digest,
)
from cir_core.lora.attention import SplitAttention, SplitQKV, fuse_attention, split_attention, split_multihead_attention
from cir_core.lora.class_token import last_block_for_class_token
from cir_core.lora.export import export_merged, merge_adapter

__all__ = [
    "LoraReport",
    "SplitAttention",
    "SplitQKV",
    "TatMetadata",
    "TwoTowerModel",
    "adapter_digest",
    "attach_lora",
    "check_lora",
    "count_parameters",
    "export_merged",
    "fuse_attention",
    "has_adapter",
    "last_block_for_class_token",
    "load_adapter",
    "local_adapter",
    "merge_adapter",
    "save_adapter",
    "split_attention",
    "split_multihead_attention",
    "weights_digest",
]
