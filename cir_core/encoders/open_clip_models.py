"""Every model that open_clip can build, as an Encoder."""

from __future__ import annotations

from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors import SafetensorError

from cir_core.encoders.sources import ModelSource, find_model
from cir_core.encoders.two_tower import LoadOptions, OpenClipEncoder, describe
from cir_core.lora import TwoTowerModel
from cir_core.schema import CirError


def load_open_clip(model: str, pretrained: str | None, options: LoadOptions) -> OpenClipEncoder:
    """Find, build, load, adapt and describe; errors as `load_encoder` says."""
    source = find_model(model, pretrained)
    return describe(
        _build(source),
        _tokenizer(source),
        model=source.model,
        pretrained=source.pretrained,
        model_cfg=source.model_cfg,
        options=options,
    )


def _build(source: ModelSource) -> TwoTowerModel:
    """The open_clip module on the CPU in float32. find_model has seen to it that it loads safetensors."""
    named = ":" not in source.name
    try:
        return open_clip.create_model(
            source.name,
            pretrained=str(source.weights) if named else None,
            require_pretrained=True,
            pretrained_text=False,  # the checkpoint holds the text tower; do not fetch another one
            **source.options,
        )
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise CirError(f"cannot load model {source.model!r} from {source.weights}: {error}") from error


def _tokenizer(source: ModelSource) -> HFTokenizer | SimpleTokenizer:
    # A tokenizer that ships code must not even be able to ask for permission to run it.
    named = source.model_cfg["text_cfg"].get("hf_tokenizer_name")
    kwargs: dict[str, Any] = {"trust_remote_code": False} if named else {}
    try:
        return open_clip.get_tokenizer(source.name, **kwargs)
    except Exception as error:  # the hub's client, transformers and tokenizers each raise their own
        raise CirError(
            f"cannot load the tokenizer of model {source.model!r}: "
            f"{' '.join(str(error).split())}; a folder needs its tokenizer files (tokenizer.json, "
            "tokenizer_config.json) beside the weights, a named model may need the hub"
        ) from error
