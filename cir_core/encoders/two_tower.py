"""Two towers, their tokenizer and their preprocessing behind the calls of an Encoder, whoever trained them.

Shapes: B batch, L tokens, D embedding dimensions, H = W the model's image size.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from cir_core.encoders.base import EncoderDetails
from cir_core.encoders.text_tower import encode_tokens
from cir_core.lora import TwoTowerModel, load_adapter, split_multihead_attention, weights_digest
from cir_core.preprocessing import Decode, Mode, Preprocessing, normalize
from cir_core.schema import CirError

# open_clip's name of how a picture is brought to size -> ours.
RESIZE_MODES: dict[str, Mode] = {"shortest": "center_crop", "squash": "squash"}
_TEXT_BATCH_SIZE = 256  # bounds memory for a caller that hands over a whole benchmark at once


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What `load_encoder` was asked for besides the model, with "auto" decided."""

    adapter: str | None
    device: torch.device
    precision: str
    preprocessing_mode: str | None
    decode: str


def load_options(
    adapter: str | Path | None, device: str, precision: str, preprocessing_mode: str | None, decode: str
) -> LoadOptions:
    """Check and decide the options of `load_encoder`."""
    chosen = _device(device)
    if precision not in ("auto", "fp32", "bf16"):
        raise CirError(f"precision must be 'auto', 'fp32' or 'bf16', not {precision!r}")
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" else "fp32"
    return LoadOptions(
        adapter=None if adapter is None else str(adapter),
        device=chosen,
        precision=precision,
        preprocessing_mode=preprocessing_mode,
        decode=decode,
    )


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


class OpenClipEncoder:
    """A model with open_clip's calls, in eval mode, with its tokenizer and preprocessing; see Encoder.

    model: the module, weights in float32; training code may attach LoRA to it.
    model_cfg: the configuration it was built from, quick_gelu as built; `lora.export_merged` wants it.
    """

    def __init__(
        self,
        model: TwoTowerModel,
        tokenizer: HFTokenizer | SimpleTokenizer,
        *,
        model_cfg: dict[str, Any],
        preprocessing: Preprocessing,
        details: EncoderDetails,
        device: torch.device,
    ) -> None:
        self.model, self.tokenizer, self.model_cfg = model, tokenizer, model_cfg
        self.preprocessing, self.details, self.device = preprocessing, details, device
        self.mean = tuple(model.visual.preprocess_cfg["mean"])
        self.std = tuple(model.visual.preprocess_cfg["std"])

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self.details.dim

    @property
    def identity(self) -> str:
        """See EncoderDetails.identity."""
        return self.details.identity

    def normalize(self, images: Tensor) -> Tensor:
        """uint8[B, 3, H, W] on any device -> float32[B, 3, H, W] on the encoder's, for the image tower."""
        size = self.preprocessing.size
        if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise CirError(
                f"images must be uint8[B, 3, {size}, {size}] for {self.details.model!r}, not "
                f"{str(images.dtype).removeprefix('torch.')}{list(images.shape)}; "
                "prepare them with its .preprocessing"
            )
        pixels: Tensor = normalize(images.to(self.device, non_blocking=True), self.mean, self.std)
        return pixels

    def tokenize(self, texts: list[str]) -> Tensor:
        """B texts -> int64[B, L] on the CPU, by the model's own tokenizer: padded, and cut at L tokens."""
        given: object = texts
        if isinstance(given, str) or not all(isinstance(text, str) for text in texts):
            raise CirError(f"texts must be a list of str, not {type(texts).__name__}: {texts!r:.80}")
        tokens: Tensor = self.tokenizer(list(texts))
        return tokens

    def count_truncated(self, texts: list[str]) -> int:
        """How many of these texts have more tokens than the model reads."""
        limit = self.details.context_length
        if isinstance(self.tokenizer, SimpleTokenizer):  # start and end of text take two places
            return sum(len(self.tokenizer.encode(text)) + 2 > limit for text in texts)
        if not texts:
            return 0
        clips = self.tokenizer.tokenizer_mode == "clips"  # adds its own three special tokens
        cleaned = [self.tokenizer.clean_fn(text) for text in texts]
        ids = self.tokenizer.tokenizer(
            cleaned, add_special_tokens=not clips, truncation=False, padding=False, verbose=False
        ).input_ids
        return sum(len(row) + 3 * clips > limit for row in ids)

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8[B, 3, H, W] -> float32[B, D] on the encoder's device, unit norm. CirError for other input."""
        with torch.inference_mode(), self._autocast():
            pixels = self.normalize(images)
            features = self._empty() if not len(pixels) else self.model.encode_image(pixels, normalize=False)
            unit = F.normalize(features.float(), dim=-1)
        return unit.clone()  # a normal tensor: training may use it in a graph, which inference tensors refuse

    def encode_texts(self, texts: list[str]) -> Tensor:
        """B texts -> float32[B, D] on the encoder's device, unit norm. CirError for other input."""
        batches = torch.split(self.tokenize(texts), _TEXT_BATCH_SIZE) if texts else ()
        with torch.inference_mode(), self._autocast():
            features = [encode_tokens(self.model, b.to(self.device)).float() for b in batches]
            unit = F.normalize(torch.cat([self._empty(), *features]), dim=-1)
        return unit.clone()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.details.precision == "bf16")

    def _empty(self) -> Tensor:
        return torch.empty(0, self.dim, device=self.device)


def describe(
    towers: TwoTowerModel,
    tokenizer: HFTokenizer | SimpleTokenizer,
    *,
    model: str,
    pretrained: str | None,
    model_cfg: dict[str, Any],
    options: LoadOptions,
) -> OpenClipEncoder:
    """Digest the weights, attach the adapter, put the parts together. `towers` is on the CPU, unadapted."""
    base_digest, adapter_digest = weights_digest(towers), None
    quick_gelu = bool(model_cfg.get("quick_gelu", False))
    if options.adapter is not None:
        adapter_digest = load_adapter(
            towers,
            options.adapter,
            base_model=model,
            expected_weights_digest=base_digest,
            quick_gelu=quick_gelu,
        )
    if options.precision == "bf16":
        split_multihead_attention(towers)
    preprocessing = _preprocessing(model, towers.visual.preprocess_cfg, options)
    details = EncoderDetails(
        model=model,
        pretrained=pretrained,
        weights_digest=base_digest,
        adapter_digest=adapter_digest,
        config_digest=_sha256(model_cfg),
        tokenizer_digest=_tokenizer_digest(tokenizer),
        preprocessing_tag=_tag(preprocessing, towers.visual.preprocess_cfg),
        dim=int(model_cfg["embed_dim"]),
        precision=options.precision,
        quick_gelu=quick_gelu,
        context_length=int(tokenizer.context_length),
    )
    return OpenClipEncoder(
        towers.to(options.device).eval().requires_grad_(False),
        tokenizer,
        model_cfg=model_cfg,
        preprocessing=preprocessing,
        details=details,
        device=options.device,
    )


def _preprocessing(model: str, config: dict[str, Any], options: LoadOptions) -> Preprocessing:
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise CirError(f"model {model!r} takes {height}x{width} images; only square ones are supported")
    mode = options.preprocessing_mode or RESIZE_MODES.get(config["resize_mode"])
    if mode is None:
        raise CirError(
            f"model {model!r} asks for resize_mode {config['resize_mode']!r}; known are "
            f"{', '.join(RESIZE_MODES)}: choose with preprocessing_mode="
        )
    return Preprocessing(
        size=int(height),
        mode=cast(Mode, mode),  # checked by Preprocessing, as decode is
        interpolation=config["interpolation"],
        decode=cast(Decode, options.decode),
    )


def _tag(preprocessing: Preprocessing, config: dict[str, Any]) -> str:
    numbers = [",".join(f"{value:g}" for value in config[key]) for key in ("mean", "std")]
    return f"{preprocessing.tag}/mean={numbers[0]}/std={numbers[1]}"


def _tokenizer_digest(tokenizer: HFTokenizer | SimpleTokenizer) -> str:
    """Vocabulary, rules and length; not the padding and truncation that a call leaves in the backend."""
    if isinstance(tokenizer, SimpleTokenizer):
        content: object = sorted(tokenizer.encoder.items(), key=lambda item: item[1])
    elif (backend := getattr(tokenizer.tokenizer, "backend_tokenizer", None)) is not None:
        content = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
    else:
        content = sorted(tokenizer.tokenizer.get_vocab().items())
    return _sha256(
        [
            content,
            tokenizer.context_length,
            getattr(tokenizer.clean_fn, "__name__", ""),
            type(tokenizer).__name__,
        ]
    )


def _sha256(content: object) -> str:
    """Digest of anything JSON can write."""
    return f"sha256:{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}"
