"""BLIP's retrieval model as an Encoder: the two projections into its shared space, through transformers.

BLIP (arXiv 2201.12086) also has a cross-attention matching head; composed retrieval ranks by cosine and
leaves it out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from huggingface_hub import snapshot_download
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn
from transformers import BlipForImageTextRetrieval

from cir_core.encoders.two_tower import LoadOptions, OpenClipEncoder, describe
from cir_core.schema import CirError

PREFIX = "blip:"
WEIGHTS_NAME = "model.safetensors"
CONTEXT_LENGTH = 35  # tokens of a caption in BLIP's retrieval training (max_txt_len in LAVIS)
_FILES = (
    "config.json",
    "preprocessor_config.json",
    WEIGHTS_NAME,
    "tokenizer*",
    "vocab.txt",
    "special_tokens_map.json",
)


class BlipImageTower(nn.Module):
    """float32[B, 3, H, W], normalised -> [B, D], the projected class token, not yet unit norm."""

    def __init__(self, blip: Any, preprocess_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.vision_model, self.vision_proj = blip.vision_model, blip.vision_proj
        self.preprocess_cfg = preprocess_cfg
        self.image_size = (preprocess_cfg["size"],) * 2

    def forward(self, images: Tensor) -> Tensor:
        """Embed a batch of images."""
        hidden = self.vision_model(pixel_values=images).last_hidden_state
        embeddings: Tensor = self.vision_proj(hidden[:, 0])
        return embeddings

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """open_clip's name for trading compute for memory while tuning."""
        if enable:
            self.vision_model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.vision_model.gradient_checkpointing_disable()


class BlipTowers(nn.Module):
    """The retrieval half of BLIP with open_clip's calls, so that LoRA and the encoder need not know it."""

    def __init__(self, blip: Any, preprocess_cfg: dict[str, Any], pad_id: int) -> None:
        super().__init__()
        self.visual = BlipImageTower(blip, preprocess_cfg)
        self.text_encoder, self.text_proj, self.pad_id = blip.text_encoder, blip.text_proj, pad_id

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Normalised images [B, 3, H, W] -> [B, D]."""
        embeddings: Tensor = self.visual(images)
        return F.normalize(embeddings, dim=-1) if normalize else embeddings

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [B, L], padded -> [B, D]."""
        hidden = self.text_encoder(input_ids=tokens, attention_mask=(tokens != self.pad_id).long())
        embeddings: Tensor = self.text_proj(hidden.last_hidden_state[:, 0])
        return F.normalize(embeddings, dim=-1) if normalize else embeddings


def load_blip(model: str, pretrained: str | None, options: LoadOptions) -> OpenClipEncoder:
    """Load "blip:<hub repository or folder>" of a BlipForImageTextRetrieval, as in
    Salesforce/blip-itm-large-coco.

    Raises CirError for a failed download, weights that are not model.safetensors, and weights that lack a
    tower.
    """
    if pretrained is not None:
        raise CirError(f"model {model!r} brings its own weights: leave out pretrained={pretrained!r}")
    folder = _folder(model)
    try:
        blip, report = BlipForImageTextRetrieval.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        tokenizer = HFTokenizer(str(folder), context_length=CONTEXT_LENGTH, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own
        raise CirError(f"cannot load model {model!r} from {folder}: {' '.join(str(error).split())}") from error
    if missing := sorted(report["missing_keys"]):
        raise CirError(f"model {model!r}: {len(missing)} weights are missing, first {missing[0]}; they would be random")
    config = blip.config
    preprocess_cfg = _preprocess_cfg(folder, config.vision_config.image_size)
    return describe(
        BlipTowers(blip, preprocess_cfg, tokenizer.tokenizer.pad_token_id),
        tokenizer,
        model=model if not Path(model.removeprefix(PREFIX)).is_dir() else f"{PREFIX}{folder.name}",
        pretrained=None,
        model_cfg={
            "embed_dim": config.image_text_hidden_size,
            "blip": {key: _plain(getattr(config, key)) for key in ("vision_config", "text_config")},
        },
        options=options,
    )


def _folder(model: str) -> Path:
    name = model.removeprefix(PREFIX)
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(_FILES)))
        except Exception as error:  # the hub's client raises its own, httpx's and the operating system's errors
            raise CirError(
                f"model {model!r}: {name} is not a folder and cannot be downloaded from the hub "
                f"({str(error).splitlines()[0]}); check the name and the network, or download it beforehand "
                f"(hf download {name}) and point HF_HOME at that cache, or give the folder"
            ) from error
    if not (folder / WEIGHTS_NAME).is_file():
        raise CirError(
            f"model {model!r}: expected {folder / WEIGHTS_NAME}; a pickle is never loaded, convert "
            "one you trust with safetensors.torch.save_file"
        )
    return folder


def _preprocess_cfg(folder: Path, size: int) -> dict[str, Any]:
    """BLIP squashes to a square, bicubic; mean and std are CLIP's unless the folder says otherwise."""
    path = folder / "preprocessor_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {
        "size": size,
        "mode": "RGB",
        "mean": tuple(stored.get("image_mean", OPENAI_DATASET_MEAN)),
        "std": tuple(stored.get("image_std", OPENAI_DATASET_STD)),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }


def _plain(config: Any) -> dict[str, Any]:
    """What a configuration says about the function, without the library's version and names of files."""
    ignored = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
    return {key: value for key, value in config.to_dict().items() if key not in ignored}
