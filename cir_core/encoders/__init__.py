"""Encoders: a model's name in, images and texts to unit vectors out.

encoder = load_encoder("scenes-tiny")                       # the embedded model, no download
encoder = load_encoder("ViT-B-32", "openai", adapter="s3://bucket/tat-adapter")
encoder.encode_texts(["a red circle"])                      # float32[1, D]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cir_core.encoders.base import Encoder, EncoderDetails

if TYPE_CHECKING:
    from cir_core.encoders.two_tower import OpenClipEncoder

__all__ = ["Encoder", "EncoderDetails", "load_encoder"]


def load_encoder(
    model: str,
    pretrained: str | None = None,
    adapter: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    *,
    preprocessing_mode: str | None = None,
    decode: str = "exact",
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
    preprocessing_mode, decode: of preprocessing.Preprocessing; the mode is the model's own by default.
    Raises CirError for every mistake in these, before any work.
    """
    # Imported here: torch, open_clip and transformers take many seconds, and who only names an encoder need not wait.
    from cir_core.encoders.two_tower import load_options

    options = load_options(adapter, device, precision, preprocessing_mode, decode)
    if model.startswith("blip:"):
        from cir_core.encoders.blip import load_blip

        return load_blip(model, pretrained, options)
    from cir_core.encoders.open_clip_models import load_open_clip

    return load_open_clip(model, pretrained, options)
