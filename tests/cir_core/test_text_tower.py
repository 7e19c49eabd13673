"""The text tower on tokens without their padding, and both towers in bfloat16, against open_clip's own calls."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

from cir_core import lora
from cir_core.encoders import load_encoder
from cir_core.encoders.text_tower import encode_tokens

LENGTH, END = 21, 49


def tower(kind: type = CLIP, **text: object) -> torch.nn.Module:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    settings = CLIPTextCfg(context_length=LENGTH, vocab_size=END + 1, width=32, heads=2, layers=3, eos_id=END, **text)
    return kind(24, vision, settings).eval().requires_grad_(False)


def tokens(*lengths: int, padding: int = 0) -> torch.Tensor:
    """Texts of these many tokens, the last of each being end-of-text."""
    rows = torch.full((len(lengths), LENGTH), padding)
    for row, length in zip(rows, lengths, strict=True):
        row[: length - 1] = torch.arange(1, length)
        row[length - 1] = END
    return rows


def seen_lengths(model: torch.nn.Module) -> list[int]:
    lengths: list[int] = []
    model.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return lengths


@pytest.mark.parametrize("length", range(2, LENGTH + 1))
@pytest.mark.parametrize("settings", [{}, {"pool_type": "eos"}, {"proj_bias": True}, {"proj_type": "none"}], ids=str)
def test_padding_decides_nothing(length: int, settings: dict[str, object]) -> None:
    model = tower(**settings)
    texts = tokens(2, length, 3)
    expected = model.encode_text(texts)
    lengths = seen_lengths(model)
    torch.testing.assert_close(encode_tokens(model, texts), expected, atol=1e-5, rtol=1e-5)
    assert lengths == [min(-(-length // 8) * 8, LENGTH)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (CLIP, {"no_causal_mask": True}),
        (CLIP, {"pool_type": "last"}),
        (CustomTextCLIP, {}),
        (CLIP, {"pool_type": "first"}),
    ],
    ids=str,
)
def test_towers_that_read_the_padding_get_it(kind: type, settings: dict[str, object]) -> None:
    model = tower(kind, **settings)
    texts = tokens(2, 5, padding=7)
    lengths = seen_lengths(model if kind is CLIP else model.text)
    assert torch.equal(encode_tokens(model, texts), model.encode_text(texts))
    assert lengths == [LENGTH, LENGTH]


def test_bf16_is_autocast_of_the_plain_model_bit_for_bit(tiny_model_dir: Path) -> None:
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu", precision="bf16")
    plain = open_clip.create_model(f"local-dir:{tiny_model_dir}").eval()
    assert any(isinstance(m, torch.nn.MultiheadAttention) for m in plain.modules())
    assert not any(isinstance(m, torch.nn.MultiheadAttention) for m in encoder.model.modules())
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    long = "red " * 40  # fills the context: nothing is cut off, which would change how sums are rounded
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        image_rows = plain.encode_image(encoder.normalize(images)).float()
        text_rows = plain.encode_text(encoder.tokenize([long, "a dog"])).float()
    assert torch.equal(encoder.encode_images(images), torch.nn.functional.normalize(image_rows, dim=-1))
    assert torch.equal(encoder.encode_texts([long, "a dog"]), torch.nn.functional.normalize(text_rows, dim=-1))


def test_a_bf16_encoder_is_exported_as_open_clip_writes_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its towers are split, the files have the names and values of the model that was loaded."""
    name = f"local-dir:{tiny_model_dir}"
    low = load_encoder(name, device="cpu", precision="bf16")
    lora.export_merged(low.model, tmp_path / "export", model_cfg=low.model_cfg, tokenizer=low.tokenizer)
    again, first = (load_encoder(f"local-dir:{f}", device="cpu") for f in (tmp_path / "export", tiny_model_dir))
    assert again.details.weights_digest == first.details.weights_digest == low.details.weights_digest
