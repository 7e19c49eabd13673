"""The small CLIP that ships with the system: its tokenizer, its architecture and its pre-training on scenes.

It is trained at CLIP's final logit scale of 100, fixed: at so low a temperature image and text embeddings settle in two
separate cones and stay there, so the model keeps a modality gap as the large CLIPs do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cir_core.losses import contrastive_loss
from cir_core.scenes.captions import describe
from cir_core.scenes.model import random_scene, seeded
from cir_core.scenes.render import IMAGE_SIZE, render

CONTEXT_LENGTH = 48
MEAN = STD = (0.5, 0.5, 0.5)
LOGIT_SCALE = 100.0
_PAD, _START, _END = "<pad>", "<start>", "<end>"


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """num_pairs pictures, drawn with replacement into `steps` batches; lr: peak of a warm-up and cosine schedule."""

    num_pairs: int = 100_000
    steps: int = 1000
    batch_size: int = 256
    lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    seed: int = 0


def pairs(seed: int, first: int, last: int) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Return pictures uint8[n, 3, H, W] and captions first .. last - 1. No JPEG between: the pictures stay exact."""
    images = np.empty((last - first, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    captions = []
    for index in range(first, last):
        rng = seeded("pretrain", seed, index)
        scene = random_scene(rng)
        captions.append(describe(scene, rng))
        images[index - first] = np.asarray(render(scene, rng, "studio")).transpose(2, 0, 1)
    return images, captions


def train_tokenizer(captions: Iterable[str], folder: Path) -> int:
    """Train a byte-level BPE tokenizer, save it in Hugging Face form, and return its vocabulary size.

    Any text can be encoded. <end> has the highest id, which is where CLIP's text tower reads its output.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[_PAD, _START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([_END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (_START, _END)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_START,
        eos_token=_END,
        pad_token=_PAD,
        model_max_length=CONTEXT_LENGTH,
    )
    fast.save_pretrained(str(folder))
    return len(fast)


def model_config(vocab_size: int) -> dict[str, Any]:
    """Return open_clip's model_cfg of the small CLIP: 2.5 M parameters."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 6, "width": 160, "head_width": 32, "patch_size": 16},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": 128,
            "heads": 4,
            "layers": 2,
            "hf_tokenizer_name": "local",  # any name: from a local-dir it means the files beside the weights
        },
    }


def _learning_rate(step: int, settings: PretrainSettings) -> float:
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.lr * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def pretrain(
    images: Tensor,
    captions: Sequence[str],
    folder: Path,
    settings: PretrainSettings,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """Train the small CLIP from scratch and write it to `folder` in open_clip's local-dir form (float16 weights).

    Args:
        images: uint8[N, 3, IMAGE_SIZE, IMAGE_SIZE].
        captions: N captions.
        folder: where open_clip_config.json, open_clip_model.safetensors and the tokenizer go.
        settings: everything that decides the result, together with the torch version and thread count.
        report: called every 50 steps with the step and {loss, accuracy, centroid_distance}.
    """
    torch.manual_seed(settings.seed)
    config = model_config(train_tokenizer(captions[:20_000], folder))
    model_arguments = {key: value for key, value in config.items() if key != "text_cfg"}
    model = open_clip.CLIP(**model_arguments, text_cfg=config["text_cfg"])
    model.logit_scale.data.fill_(math.log(LOGIT_SCALE))
    model.logit_scale.requires_grad_(False)
    preprocess = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n"
    )
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    tokens = tokenizer(list(captions))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), eps=1e-6)
    generator = torch.Generator().manual_seed(settings.seed)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for step in range(settings.steps):
        rows = torch.randint(len(captions), (settings.batch_size,), generator=generator)
        image = F.normalize(model.encode_image((images[rows].float() / 255 - mean) / std), dim=-1)
        text = F.normalize(model.encode_text(tokens[rows]), dim=-1)
        loss = contrastive_loss(image, text, 1 / LOGIT_SCALE)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, settings)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            right = (image @ text.T).argmax(1) == torch.arange(len(rows))
            distance = (image.mean(0) - text.mean(0)).norm()
            report(
                step + 1,
                {"loss": loss.item(), "accuracy": right.float().mean().item(), "centroid_distance": distance.item()},
            )
    weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
