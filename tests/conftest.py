"""Fixtures for every test: tiny real models in open_clip's local-dir form, made from a fixed seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("random", deadline=None)  # a busy machine is no failure
settings.register_profile("same", deadline=None, derandomize=True)  # a change is judged by what it changes
settings.load_profile("same")

WORDS = (
    "a an the and of on in left right above below next to picture photo is with make it change remove add "
    "one two three red green blue yellow white black small large circle square triangle star cross ring "
).split()
CONTEXT_LENGTH = 16
VISION: dict[str, dict[str, Any]] = {
    # head_width 8 -> 4 heads: a wrong split of the heads changes the outputs
    "vit": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8},
    "timm": {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"},
}


def _save_tokenizer(folder: Path) -> int:
    """A word-level tokenizer; returns its size. [EOS] has the highest id: argmax pooling finds it by that."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[UNK]", *WORDS, "[EOS]"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[(name, vocabulary[name]) for name in ("[BOS]", "[EOS]")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",  # noqa: S106
        bos_token="[BOS]",  # noqa: S106
        eos_token="[EOS]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        model_max_length=CONTEXT_LENGTH,
    ).save_pretrained(folder)
    return len(vocabulary)


def make_tiny_model(
    folder: Path, *, seed: int = 0, vision: str = "vit", simple_tokenizer: bool = False, **model_cfg: Any
) -> Path:
    """Write a tiny CLIP with random weights, its configuration and tokenizer to `folder`; returns that."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "width": 32, "heads": 4, "layers": 2}
    if not simple_tokenizer:
        text |= {"vocab_size": _save_tokenizer(folder), "hf_tokenizer_name": "local"}
    config = {"embed_dim": 24, "vision_cfg": VISION[vision], "text_cfg": text, **model_cfg}
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        custom_text = config.pop("custom_text", False)
        model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**config)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def make_tiny_model_dir() -> Callable[..., Path]:
    """make_tiny_model(folder, seed=, vision="vit" | "timm", simple_tokenizer=, **model_cfg) -> folder."""
    return make_tiny_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP (32x32 images, 24 dimensions, 16 tokens) in local-dir form. Shared: never write to it."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def pytest_collection_modifyitems(items):
    """Let tests with real servers leave sockets of Ray's and MLflow's clients open: they close when the process ends."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
