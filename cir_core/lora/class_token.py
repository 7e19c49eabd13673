"""The last block of an image tower, computed for the class token alone.

open_clip's VisionTransformer returns the class token's row after the last block and drops the others, which that block
has computed nevertheless. What reads them, the attention's keys and values, comes before: queries, attention, output
projection and the MLP of the other rows are for nothing, forward and backward. Of 12 blocks that is 7 % of the work.
"""

from __future__ import annotations

from typing import Any

from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn


class ClassTokenBlock(nn.Module):
    """open_clip's ResidualAttentionBlock as a tower's last: [B, L, D] -> [B, 1, D]. Takes over its submodules."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = block.ln_1, block.attn, block.ls_1  # the same names, so the same state dict
        self.ln_2, self.mlp, self.ls_2 = block.ln_2, block.mlp, block.ls_2
        self.training = block.training

    def forward(self, x_BLD: Tensor, k_x: None = None, v_x: None = None, attn_mask: None = None) -> Tensor:
        """Return what the block would for the first row. The other arguments are the block's; a tower passes none."""
        if not (k_x is v_x is attn_mask is None):
            raise NotImplementedError("ClassTokenBlock is for image towers: self-attention without a mask")
        normal_BLD = self.ln_1(x_BLD)
        attended = self.attn(normal_BLD[:, :1], normal_BLD, normal_BLD, need_weights=False)[0]
        x_B1D = x_BLD[:, :1] + self.ls_1(attended)
        result: Tensor = x_B1D + self.ls_2(self.mlp(self.ln_2(x_B1D)))
        return result


def last_block_for_class_token(visual: Any) -> bool:
    """Replace the last block of `visual` in place; the tower's outputs stay equal to rounding.

    Returns False, with nothing done, for a tower that reads other rows too or is built otherwise.
    """
    tower = visual.get_base_model() if hasattr(visual, "peft_config") else visual
    if type(tower) is not VisionTransformer or not tower.transformer.batch_first:
        return False
    reads_others = tower.output_tokens or tower.attn_pool is not None or tower.pool_type != "tok"
    blocks = tower.transformer.resblocks
    if reads_others or type(blocks[-1]) is not ResidualAttentionBlock or hasattr(blocks[-1], "ln_1_kv"):
        return False
    blocks[-1] = ClassTokenBlock(blocks[-1])
    return True
