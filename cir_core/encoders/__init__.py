"""Encoders: a model's name in, images and texts to unit vectors out.

encoder = load_encoder("scenes-tiny")                       # the embedded model, no download
encoder = load_encoder("ViT-B-32", "openai", adapter="s3://bucket/tat-adapter")
encoder.encode_texts(["a red circle"])                      # float32[1, D]
"""

from __future__ import annotations

from pathlib import Path

import torch

from cir_core.encoders.base import Encoder, EncoderDetails
from cir_core.encoders.blip import PREFIX, load_blip
from cir_core.encoders.open_clip_models import load_open_clip
from cir_core.encoders.two_tower import LoadOptions, OpenClipEncoder
from cir_core.schema import CirError

__all__ = ["Encoder", "EncoderDetails", "OpenClipEncoder", "load_encoder"]


def load_encoder(
    model: str,
    pretrained: str | None = None,
    adapter: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    *,
    preprocessing_mode: str | None = None,
) -> OpenClipEncoder:
    """Load an encoder, ready for inference.

    model: an open_clip architecture ("ViT-B-32"), "hf-hub:org/name", "local-dir:/path", "scenes-tiny",
    or "blip:<hub repository or folder>".
    pretrained: the weights tag of a named model ("openai", "laion2b_s34b_b79k") or a .safetensors file; None
    otherwise. A tag brings its activation and normalisation; with a file choose the "-quickgelu" name if it
    was trained so.
    adapter: a PEFT folder made by `lora.save_adapter`, local or a URI; it must have been tuned from this very
    model.
    device: "auto" = CUDA when there is one, else CPU; or a torch device ("cpu", "cuda:1").
    precision: "auto" = bf16 autocast on CUDA, float32 elsewhere; "fp32"; "bf16". Results are float32 in any
    case.
    preprocessing_mode: a mode of preprocessing.Preprocessing instead of the model's own.
    Raises CirError for every mistake in these, before any work.
    """
    chosen = _device(device)
    if precision not in ("auto", "fp32", "bf16"):
        raise CirError(f"precision must be 'auto', 'fp32' or 'bf16', not {precision!r}")
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" else "fp32"
    options = LoadOptions(
        adapter=None if adapter is None else str(adapter),
        device=chosen,
        precision=precision,
        preprocessing_mode=preprocessing_mode,
    )
    load = load_blip if model.startswith(PREFIX) else load_open_clip
    return load(model, pretrained, options)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise CirError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<n>', not {device!r}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise CirError(
            f"device {device!r} is not here: this machine has {torch.cuda.device_count()} CUDA devices; "
            "use 'auto' or 'cpu'"
        )
    return chosen
