"""The training step: only the adapter moves, the loss falls, and a restored run ends where an uninterrupted one does."""

import hashlib

import numpy as np
import pytest
import torch

from cir_core.encoders import load_encoder
from cir_core.lora import attach_lora, weights_digest
from cir_core.schema import CirError
from cir_core.tuning import TextAnchoredTuner, TuningSettings

TEXTS = ["a red circle", "a blue square", "a green star", "two small rings", "a large cross", "the black triangle"]


def batch(seed, rows=6, size=32):
    """Return seeded pictures, captions and a mask."""
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (rows, 3, size, size), dtype=np.uint8))
    return images, TEXTS[:rows], torch.ones(rows, dtype=torch.bool)


def tuner(tiny_model_dir, **changed):
    """Return a tuner with a fresh adapter on the tiny model."""
    settings = TuningSettings(**{"total_steps": 8, "lr": 1e-2, **changed})
    torch.manual_seed(settings.seed)
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    attach_lora(encoder.model, r=4, lora_alpha=4, lora_dropout=0.2)
    return TextAnchoredTuner(encoder, settings)


def adapter_bytes(one):
    """Return a digest of the trained parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(one.trainable.items()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def test_the_loss_falls_and_only_the_adapter_moves(tiny_model_dir):
    one = tuner(tiny_model_dir, total_steps=60)
    text_before = one.encoder.encode_texts(TEXTS)
    frozen_before = weights_digest(one.encoder.model, without="visual.")
    losses = [one.step(index, *batch(0)).loss.item() for index in range(60)]
    assert losses[-1] < losses[0] - 0.1
    assert weights_digest(one.encoder.model, without="visual.") == frozen_before
    assert torch.equal(one.encoder.encode_texts(TEXTS), text_before)


def test_a_restored_run_equals_an_uninterrupted_one(tiny_model_dir, tmp_path):
    whole = tuner(tiny_model_dir)
    for index in range(8):
        whole.step(index, *batch(index))
    first = tuner(tiny_model_dir)
    for index in range(5):
        first.step(index, *batch(index))
    (tmp_path / "state").write_bytes(first.state_bytes({"step": 5, "history": [1.5]}))
    second = tuner(tiny_model_dir, seed=0)
    assert second.load_state(str(tmp_path / "state")) == {"step": 5, "history": [1.5]}
    for index in range(5, 8):
        second.step(index, *batch(index))
    assert adapter_bytes(second) == adapter_bytes(whole)


def test_state_of_another_adapter_is_refused(tiny_model_dir, tmp_path):
    one = tuner(tiny_model_dir)
    (tmp_path / "state").write_bytes(one.state_bytes({}))
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    attach_lora(encoder.model, r=4, lora_alpha=4, target_modules=("k_proj",))
    other = TextAnchoredTuner(encoder, TuningSettings(total_steps=1))
    with pytest.raises(CirError, match="another adapter"):
        other.load_state(str(tmp_path / "state"))


def test_a_model_without_an_adapter_is_refused(tiny_model_dir):
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    with pytest.raises(CirError, match="no adapter"):
        TextAnchoredTuner(encoder, TuningSettings(total_steps=1))


def test_the_rate_warms_up_and_falls_to_nothing(tiny_model_dir):
    one = tuner(tiny_model_dir, total_steps=100, warmup_steps=10, lr=1.0)
    rates = [one.settings.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_clipping_bounds_the_update_and_reports_the_norm_before(tiny_model_dir):
    free, clipped = (tuner(tiny_model_dir, max_grad_norm=limit) for limit in (0.0, 1e-3))
    norms = [one.step(0, *batch(1)).grad_norm.item() for one in (free, clipped)]
    assert norms[0] == pytest.approx(norms[1])
    total = torch.stack([p.grad.norm() for p in clipped.trainable.values() if p.grad is not None]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-2)


def test_placeholder_rows_change_nothing(tiny_model_dir):
    settings = {"total_steps": 1}
    full, padded = tuner(tiny_model_dir, **settings), tuner(tiny_model_dir, **settings)
    for one in (full, padded):
        one.encoder.model.eval()
    images, texts, valid = batch(2, rows=4)
    loss = full.loss(images, texts, valid)
    more = torch.cat([images, torch.zeros(2, *images.shape[1:], dtype=torch.uint8)])
    mask = torch.tensor([True] * 4 + [False] * 2)
    assert padded.loss(more, [*texts, "", ""], mask).item() == pytest.approx(loss.item(), abs=1e-6)


def test_gradient_checkpointing_gives_the_same_step(tiny_model_dir):
    digests = []
    for flag in (False, True):
        one = tuner(tiny_model_dir, gradient_checkpointing=flag)
        one.step(0, *batch(3))
        digests.append(one.state_bytes({}))
    assert digests[0] == digests[1]


def test_ready_anchors_give_the_loss_of_their_captions(tiny_model_dir):
    """Over whole runs: with a text tower, and with anchors and none."""
    losses, digests = [], []
    for cached in (False, True):
        one = tuner(tiny_model_dir)
        anchors = one.encoder.encode_texts(TEXTS)
        if cached:
            one.drop_text_tower()
        found = []
        for index in range(8):
            images, texts, valid = batch(index)
            valid[index % 6] = False
            given = anchors.masked_fill(~valid[:, None], 0.0) if cached else texts
            found.append(one.step(index, images, given, valid).loss.item())
        losses.append(found)
        digests.append(one.state_bytes({}))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert len(set(losses[0])) == 8
    assert len(digests[0]) == len(digests[1])


def test_dropping_the_text_tower_frees_all_but_the_image_tower(tiny_model_dir):
    one = tuner(tiny_model_dir)
    images, texts, valid = batch(0)
    one.drop_text_tower()
    held = {name for name, tensor in one.encoder.model.state_dict().items() if not tensor.is_meta}
    assert held
    assert all(name.startswith("visual.") for name in held)
    assert not any(tensor.is_meta for name, tensor in one.encoder.model.visual.state_dict().items())
    with pytest.raises(CirError, match="was dropped"):
        one.loss(images, texts, valid)


@pytest.mark.parametrize(
    "spoil",
    [lambda a: a * 1.01, lambda a: a[:-1], lambda a: a.double(), lambda a: a[:, :-1], lambda a: a * torch.nan],
)
def test_anchors_that_are_not_unit_vectors_of_the_batch_are_refused(tiny_model_dir, spoil):
    one = tuner(tiny_model_dir)
    images, texts, valid = batch(0)
    with pytest.raises(CirError, match="text anchors must be"):
        one.loss(images, spoil(one.encoder.encode_texts(texts)), valid)
