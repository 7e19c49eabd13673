"""The sides of the training measurements do the same work, and the tables say what was measured."""

import contextlib
import copy
import math
import os
from unittest import mock

import pytest
import torch

from cir_core.encoders import load_encoder
from cir_core.losses import contrastive_loss
from cir_core.preprocessing import Preprocessing
from cir_core.schema import CirError
from cir_core.tuning import TextAnchoredTuner, TuningSettings
from jobs.benchmark import MEASUREMENTS, BenchmarkConfig, Turns
from jobs.benchmark_embedding import write_photos
from jobs.benchmark_rivals import (
    InMemoryLoader,
    PlainStep,
    R,
    attention_weights,
    make_batch,
    make_tuner,
    open_clip_epoch,
    peft_encoder,
)
from jobs.benchmark_training import Contest, compare, kept_bytes, measure_training_caching
from jobs.benchmark_training_job import Steady, decode_cpu_seconds, measure_training_job, report, steady

SETTINGS = TuningSettings(total_steps=100, lr=1e-3)
LAYERS, WIDTH = 2, 32  # of the tiny model


@pytest.fixture(scope="module")
def encoder(tiny_model_dir):
    return load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")


@pytest.fixture
def batch(encoder):
    torch.manual_seed(1)
    return make_batch(encoder, 8)


def config(tiny_model_dir, **changed):
    settings = {"model": f"local-dir:{tiny_model_dir}", "batch_size": 4, "rounds": 2, "steps_per_round": 1, **changed}
    return BenchmarkConfig.model_validate(settings)


def moved(before, after):
    """Names of the tensors that differ."""
    return {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}


def test_all_sides_start_from_the_same_embeddings(encoder, batch):
    expected = encoder.encode_images(batch.images)
    tuner, plain = make_tuner(encoder, SETTINGS), PlainStep(peft_encoder(encoder), SETTINGS)
    torch.testing.assert_close(tuner.encoder.encode_images(batch.images), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.embed(batch.images).detach(), expected, rtol=0, atol=1e-6)
    assert tuner.encoder.model is not encoder.model is not plain.encoder.model
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_equal_rank_is_other_targets(encoder):
    ours, theirs = make_tuner(encoder, SETTINGS), PlainStep(peft_encoder(encoder), SETTINGS)
    assert sum(one.numel() for one in ours.trainable.values()) == LAYERS * 2 * R * 2 * WIDTH  # q_proj, v_proj
    assert sum(one.numel() for one in theirs.trainable) == LAYERS * R * (4 * WIDTH + 2 * WIDTH)  # in_proj, out_proj


def test_a_plain_step_is_our_step(encoder, batch):
    sides = []
    for make in (PlainStep, TextAnchoredTuner):
        torch.manual_seed(3)
        sides.append(make(peft_encoder(encoder), SETTINGS))
    plain, ours = sides
    for number in range(3):
        loss = plain.step(batch.images, batch.anchors)
        torch.testing.assert_close(ours.step(number, batch.images, batch.anchors, batch.valid).loss, loss)
    assert loss < contrastive(encoder, batch)
    for one, other in zip(plain.trainable, ours.trainable.values(), strict=True):
        # the rates differ by the schedule's 0.1 %, and a step of Adam is about as long as the rate
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def contrastive(encoder, batch):
    return contrastive_loss(encoder.encode_images(batch.images), batch.anchors, SETTINGS.temperature)


def test_peft_leaves_dropout_out_and_moves_the_frozen_weights(encoder, batch):
    torch.manual_seed(5)
    plain = PlainStep(peft_encoder(encoder), SETTINGS)
    before = attention_weights(plain.encoder)
    assert len(before) == LAYERS
    for _ in range(20):
        plain.step(batch.images, batch.anchors)
    assert torch.equal(plain.embed(batch.images), plain.embed(batch.images))
    drift = max(
        float((new - old).abs().max()) for old, new in zip(before, attention_weights(plain.encoder), strict=True)
    )
    assert 0 < drift < 1e-5
    tuner = make_tuner(encoder, SETTINGS)
    for number in range(3):
        tuner.step(number, batch.images, batch.anchors, batch.valid)
    tuner.tower.train()
    first, second = (tuner.tower(encoder.normalize(batch.images)) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("adapted", [False, True])
def test_open_clips_trainer_trains_the_image_tower_alone(encoder, batch, adapted):
    given = copy.deepcopy(encoder.model.state_dict())
    epoch = open_clip_epoch(encoder, SETTINGS, batch, steps=3, adapted=adapted)
    model = epoch.args[0]
    before = copy.deepcopy(model.state_dict())
    epoch()
    changed = moved(before, model.state_dict()) - {"logit_scale"}
    if adapted:
        drifting = {name for name in before if name.endswith(("in_proj_weight", "out_proj.base_layer.weight"))}
        assert changed - drifting
        assert all("lora_" in name for name in changed - drifting)
    else:
        assert {"visual.conv1.weight", "visual.proj", "visual.transformer.resblocks.0.attn.in_proj_weight"} <= changed
    assert all(name.startswith("visual.") for name in changed)
    assert not moved(given, encoder.model.state_dict())
    trained = {id(one) for group in epoch.args[4].param_groups for one in group["params"]}
    assert trained == {id(one) for one in model.parameters() if one.requires_grad}


def test_an_epoch_in_memory_has_so_many_steps(batch):
    tokens = torch.arange(8)
    loader = InMemoryLoader(batch.images, tokens, 3)
    pairs = list(loader.dataloader)
    assert (len(pairs), loader.num_batches, loader.num_samples) == (3, 3, 24)
    assert all(images is batch.images and texts is tokens for images, texts in pairs)


def test_a_table_shows_medians_and_the_ratios_of_the_rounds():
    ours, theirs = Turns([10.0, 20.0, 30.0], [5.0, 5.0, 5.0]), Turns([5.0, 5.0, 5.0], [1.0, 2.0, 4.0])
    measured = compare(
        "Training X", "notes", "ours", [Contest("it", "theirs", ours, theirs, ("7",))], columns=["MB"], cells="9"
    )
    assert "| ours | 20.00 | 1 | 5.00 | 1 | 9 |" in measured.markdown
    assert "| theirs | 5.00 | 4.00 [2.00, 6.00] | 2.00 | 2.50 [1.25, 5.00] | 7 |" in measured.markdown
    assert measured.metrics == {
        "training_x/first_samples_per_second": 20.0,
        "training_x/it_samples_per_second": 5.0,
        "training_x/first_over_it": 4.0,
        "training_x/first_over_it_cpu": 2.5,
    }


@pytest.mark.parametrize("name", ["training_peft", "training_open_clip"])
def test_a_measurement_prints_its_sides(tiny_model_dir, name):
    printed = MEASUREMENTS[name](config(tiny_model_dir)).markdown
    rows = [line for line in printed.splitlines() if line.startswith("| ") and "median of 2 rounds" not in line]
    assert len(rows) == 3
    assert rows[0].startswith("| ours | ")


def test_both_towers_are_measured_beside_open_clips_calls(tiny_model_dir):
    measured = MEASUREMENTS["encoder"](config(tiny_model_dir))
    assert measured.markdown.count("| ours, bf16 | ") == measured.markdown.count("| open_clip, bf16 autocast | ") == 2
    assert {key.split("/")[0] for key in measured.metrics} == {"encoder_images", "encoder_captions"}
    assert all(math.isfinite(value) and value > 0 for value in measured.metrics.values())


def test_caching_is_measured_with_its_bytes(tiny_model_dir, encoder, batch):
    metrics = measure_training_caching(config(tiny_model_dir, micro_batch_size=1)).metrics
    assert all(math.isfinite(value) and value > 0 for value in metrics.values())
    kept = {key: metrics[f"training_caching/{key}_kept_bytes"] for key in ("first", "caching", "checkpointing", "both")}
    assert kept["both"] < kept["checkpointing"] < kept["first"]
    assert kept["caching"] < kept["first"] / 2
    whole = TuningSettings(total_steps=1)
    assert kept_bytes(make_tuner(encoder, whole), batch) > kept["first"]  # 8 samples, not 4


def test_a_tower_without_such_attention_is_refused(make_tiny_model_dir, tmp_path):
    folder = make_tiny_model_dir(tmp_path / "timm", vision="timm")
    with pytest.raises(CirError, match="which PEFT's path is made for"):
        peft_encoder(load_encoder(f"local-dir:{folder}", device="cpu"))


def test_steady_steps_are_those_between_the_first_and_the_last():
    waits = [0.9, 0.9, 0.9, 0.0, 0.5, 0.0, 0.0, 0.9]
    rates = [1.0, 1.0, 1.0, 4.0, 2.0, 4.0, 4.0, 1.0]
    history = [{"samples_per_second": rate, "data_wait_share": wait} for rate, wait in zip(rates, waits, strict=True)]
    found = steady(history, 8)
    assert found.samples_per_second == pytest.approx(4 * 8 / (2 + 4 + 2 + 2))
    assert found.data_wait_share == pytest.approx(2 / 10)
    with pytest.raises(CirError, match="7 steps"):
        steady(history[1:], 8)


def test_the_jobs_report_weighs_decoding_against_a_step(tiny_model_dir, tmp_path):
    write_photos(str(tmp_path), 2, side=64)
    decode_s = decode_cpu_seconds(str(tmp_path / "00000.tar"), Preprocessing(size=32))
    assert decode_s > 0
    jobs = [Steady(9.0, 0.01), Steady(10.0, 0.03), Steady(9.5, 0.02)]
    measured = report(config(tiny_model_dir), "A step", jobs=jobs, bare=[(10.0, 5.0)] * 3, decode_s=0.01)
    assert measured.metrics["training_job/over_bare"] == pytest.approx(0.95)
    assert measured.metrics["training_job/data_wait_share"] == pytest.approx(0.02)
    assert measured.metrics["training_job/decode_over_step_cpu"] == pytest.approx(0.05)
    assert "| tat_train.py | 9.50 | 1 | 2.0 % |" in measured.markdown
    assert "| bare loop | 10.00 | 0.95 [0.90, 1.00] | - |" in measured.markdown


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated"
)  # MLflow's, where its store is no server
def test_the_job_is_measured_beside_the_bare_loop(servers, tiny_model_dir):
    with mock.patch.dict(os.environ, servers.environment()), contextlib.chdir(servers.storage):
        measured = measure_training_job(config(tiny_model_dir, rounds=1, images=40, side=64))
    assert measured.metrics["training_job/over_bare"] > 0
    assert 0 <= measured.metrics["training_job/data_wait_share"] <= 1
