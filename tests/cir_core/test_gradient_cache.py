"""Gradient caching: the gradients are those of the whole batch, the memory is that of a micro-batch.

Several processes: test_losses.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cir_core.encoders import load_encoder
from cir_core.lora import attach_lora
from cir_core.losses import contrastive_loss
from cir_core.tuning import TextAnchoredTuner, TuningSettings, backward_in_micro_batches, micro_batches
from cir_core.tuning.saved_tensors import SavedTensors

ROWS, DIM, WIDTH = 11, 6, 5


def test_micro_batches_cover_every_row_once():
    assert micro_batches(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert micro_batches(6, 3) == [slice(0, 3), slice(3, 6)]
    assert micro_batches(5, 0) == micro_batches(5, 5) == micro_batches(5, 9) == [slice(0, 5)]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    generator = torch.Generator().manual_seed(7)
    module = nn.Sequential(nn.Linear(DIM, 16), nn.Tanh(), nn.Linear(16, WIDTH)).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return module


def rows_of_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs, texts = torch.randn(ROWS, DIM, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)
    return inputs, F.normalize(texts, dim=-1)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def info_nce(image: Tensor, text: Tensor) -> Tensor:
    """The loss in the inputs' own precision; cir_core's is float32 inside."""
    logits, target = image @ text.T / 0.07, torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@pytest.mark.parametrize("size", [1, 2, 4, 5, 10, ROWS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_gradients_equal_those_of_the_whole_batch(size, dtype, tolerance):
    """11 rows: the last micro-batch is shorter, for all sizes but 1 and 11."""
    inputs, texts = (x.to(dtype) for x in rows_of_data())
    whole, cut = network(dtype), network(dtype)
    loss = info_nce(F.normalize(whole(inputs), dim=-1), texts)
    loss.backward()
    seen: list[tuple[int, bool]] = []

    def embed(rows: slice) -> Tensor:
        seen.append((rows.start, torch.is_grad_enabled()))
        return F.normalize(cut(inputs[rows]), dim=-1)

    found = backward_in_micro_batches(embed, lambda image: info_nce(image, texts), micro_batches(ROWS, size))
    assert found.item() == pytest.approx(loss.item(), abs=tolerance)
    assert not found.requires_grad
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(cut)[name], gradient, atol=tolerance, rtol=tolerance)
    starts = list(range(0, ROWS, size))
    assert seen == [(s, False) for s in starts[:-1]] + [(starts[-1], True)] + [(s, True) for s in starts[:-1]]


def tuner(tiny_model_dir, *, lora_dropout: float = 0.0, **changed) -> TextAnchoredTuner:
    torch.manual_seed(0)
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    attach_lora(encoder.model, r=4, lora_alpha=4, lora_dropout=lora_dropout)
    one = TextAnchoredTuner(encoder, TuningSettings(**{"total_steps": 8, "lr": 1e-2, **changed}))
    with torch.no_grad():  # B is zero at the start, and with it the gradient of A
        for name, parameter in one.trainable.items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return one


def batch(num_rows: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pictures, anchors and a mask with two placeholders."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (num_rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    anchors = F.normalize(torch.randn(num_rows, dim, generator=generator), dim=-1)
    valid = torch.ones(num_rows, dtype=torch.bool)
    valid[[1, num_rows - 1]] = False
    return images.masked_fill(~valid[:, None, None, None], 0), anchors, valid


def tuner_gradients(one: TextAnchoredTuner) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in one.trainable.items()}


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_tuners_gradients_equal_those_of_the_whole_batch(tiny_model_dir, size):
    whole, cut = tuner(tiny_model_dir), tuner(tiny_model_dir, micro_batch_size=size)
    given = batch(7, whole.encoder.dim)
    loss = whole.loss(*given)
    loss.backward()
    assert cut.backward(0, *given).item() == pytest.approx(loss.item(), abs=1e-5)
    for name, gradient in tuner_gradients(whole).items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(tuner_gradients(cut)[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [3, 0])
def test_with_dropout_both_passes_of_a_micro_batch_drop_the_same(tiny_model_dir, size, checkpointing):
    """The reference holds the graphs of all micro-batches at once, each seeded as documented."""
    settings = {"lora_dropout": 0.3, "seed": 5}
    cut = tuner(tiny_model_dir, micro_batch_size=size, gradient_checkpointing=checkpointing, **settings)
    whole = tuner(tiny_model_dir, **settings)
    images, anchors, valid = batch(7, whole.encoder.dim)
    cut.tower.train()
    whole.tower.train()
    parts = []
    for rows in micro_batches(7, size):
        torch.manual_seed(hash((5, 2, 0, rows.start) if rows.start else (5, 2, 0)) & 0x7FFFFFFF)
        parts.append(whole.tower(whole.encoder.normalize(images[rows])))
    loss = contrastive_loss(torch.cat(parts), anchors, 0.07, valid=valid)
    loss.backward()
    assert cut.backward(2, images, anchors, valid).item() == pytest.approx(loss.item(), abs=1e-5)
    for name, gradient in tuner_gradients(whole).items():
        torch.testing.assert_close(tuner_gradients(cut)[name], gradient, atol=1e-5, rtol=1e-5)
    other = tuner(tiny_model_dir, micro_batch_size=size, **settings)
    other.tower.train()
    assert abs(other.backward(3, images, anchors, valid).item() - loss.item()) > 1e-4  # another step drops others


def test_captions_are_embedded_in_micro_batches(tiny_model_dir):
    one = tuner(tiny_model_dir, micro_batch_size=3)
    texts = ["a red circle", "a blue square", "a green star", "two small rings", "a large cross", "", "a picture"]
    images, _, valid = batch(7, one.encoder.dim)
    expected = one.backward(0, images, one.encoder.encode_texts(texts), valid)
    rows = []
    one.encoder.model.token_embedding.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    assert one.backward(0, images, texts, valid).item() == pytest.approx(expected.item(), abs=1e-5)
    assert rows == [3, 3, 1]


def peak_of(one: TextAnchoredTuner, num_rows: int) -> int:
    given = batch(num_rows, one.encoder.dim)
    one.tower.train()
    with SavedTensors(one.encoder.model.parameters()) as saved:
        one.backward(0, *given)
    assert saved.bytes_now == 0
    return saved.peak_bytes


def test_a_batch_of_1024_takes_the_memory_of_one_of_64(tiny_model_dir):
    """Activations, exactly; beside them only what the loss itself keeps: its matrices of 1024 x 1024 cosines."""
    cut, small = tuner(tiny_model_dir, micro_batch_size=64, lora_dropout=0.1), tuner(tiny_model_dir, lora_dropout=0.1)
    leaves = [torch.randn(1024, cut.encoder.dim, requires_grad=True), torch.randn(1024, cut.encoder.dim)]
    with SavedTensors() as of_loss:
        loss = contrastive_loss(*leaves, 0.07, valid=torch.ones(1024, dtype=torch.bool))
    del loss
    of_64 = peak_of(small, 64)
    assert of_64 > 64 * 17 * 32 * 4 * 2 * 8  # 17 tokens, width 32, 4 bytes, 2 layers, at least 8 tensors of a layer
    assert peak_of(cut, 1024) - of_loss.peak_bytes <= 1.01 * of_64
    assert peak_of(tuner(tiny_model_dir, lora_dropout=0.1), 256) > 3.9 * of_64
