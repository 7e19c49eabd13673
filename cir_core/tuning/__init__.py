"""Text-Anchored-Tuning, the training step: LoRA on the image tower pulls images towards frozen text embeddings.

Pure torch, one process of W: the job hands in the gather across processes and the wrapper that averages gradients
(DistributedDataParallel). Everything random in a step is seeded by the step itself, so an interrupted run that goes on
from its state ends in the same weights as one that was never interrupted.

The text tower is frozen, so a caption's embedding never changes: a step takes captions, or anchors made from them
before (`encode_texts`), and a tuner that is given anchors needs no text tower.

Source: arXiv 2405.00571, section 4. Loss, temperature, LoRA, AdamW and learning rate are the paper's; weight decay,
warm-up, schedule and clipping are not published and are settings.
"""

from cir_core.tuning.gradient_cache import backward_in_micro_batches, micro_batches
from cir_core.tuning.settings import TuningSettings
from cir_core.tuning.tuner import StepResult, TextAnchoredTuner

__all__ = ["StepResult", "TextAnchoredTuner", "TuningSettings", "backward_in_micro_batches", "micro_batches"]
