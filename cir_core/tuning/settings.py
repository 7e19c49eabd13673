"""What a training step needs to know."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """What a step needs to know. lr: peak; warmup_steps: linear from zero, then a cosine to zero at total_steps.

    max_grad_norm: gradients are scaled down to this norm, 0 = never. precision: "fp32" or "bf16" (autocast).
    micro_batch_size: rows of a process whose activations are held at once, see `gradient_cache`; 0 = all.
    patch_dropout: share of the patches left out of every training image; the paper's method has none.
    """

    total_steps: int
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    temperature: float = 0.07
    precision: str = "fp32"
    micro_batch_size: int = 0
    gradient_checkpointing: bool = False
    patch_dropout: float = 0.0
    seed: int = 0

    def learning_rate(self, step: int) -> float:
        """Return the rate of step 0 .. total_steps - 1: linear warm-up, then half a cosine."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))
