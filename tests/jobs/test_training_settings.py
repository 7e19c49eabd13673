"""What a tuning run is told and records: settings of the machine, settings of the method."""

import pytest

from cir_core.schema import CirError
from cir_core.shards import index_shard, list_shards, write_tar_shard
from jobs.models import inspect_model
from jobs.start_up import StartUp
from jobs.storage import RunFolder
from jobs.tat_train import TatTrainConfig
from jobs.training_data import RunPlan
from jobs.training_job import _OPERATIONAL, loop_settings
from jobs.training_loop import steps_to_log


def settings_of(tmp_path, **changed):
    """Return what the workers would be told."""
    write_tar_shard(str(tmp_path / "00000.tar"), [(f"{number}", b"bytes", "jpg", "a picture") for number in range(10)])
    indexes = tuple(index_shard(shard) for shard in list_shards(str(tmp_path)))
    config = TatTrainConfig(storage_path=str(tmp_path), global_batch_size=4, **changed)
    plan = RunPlan(indexes, config.batch, config.seed, config.epochs)
    folder = RunFolder(str(tmp_path), "tat_train", "run")
    return loop_settings(config, folder, plan, "id", start_up=StartUp(), first_step=0)


def test_the_settings_of_the_step_reach_the_workers(tmp_path):
    changed = {"micro_batch_size": 3, "patch_dropout": 0.5, "gradient_checkpointing": True, "seed": 7, "lr": 0.5}
    changed |= {"weight_decay": 0.25, "max_grad_norm": 2.0, "temperature": 0.125, "precision": "bf16"}
    tuning = settings_of(tmp_path, **changed).tuning
    assert {name: getattr(tuning, name) for name in changed} == changed
    assert tuning.total_steps == 3


@pytest.mark.parametrize(
    ("done", "first", "every", "steps"),
    [(10, 0, 10, 10), (120, 0, 10, 10), (125, 0, 10, 5), (10, 7, 10, 3), (13, 7, 10, 3), (8, 7, 1, 1), (3, 0, 50, 3)],
)
def test_a_line_counts_the_steps_since_the_one_before(done, first, every, steps):
    assert steps_to_log(done, first, every) == steps


def test_an_adapter_says_whether_patches_were_left_out(tmp_path):
    assert settings_of(tmp_path).tat["extra"] == {"patch_dropout": 0.0}
    assert settings_of(tmp_path, patch_dropout=0.5).tat["extra"] == {"patch_dropout": 0.5}


def test_a_resumed_run_may_change_its_micro_batches_and_not_its_method():
    plain = TatTrainConfig().digest(_OPERATIONAL)
    assert TatTrainConfig(micro_batch_size=64).digest(_OPERATIONAL) == plain
    assert TatTrainConfig(patch_dropout=0.5).digest(_OPERATIONAL) != plain


def test_the_help_says_that_patch_dropout_is_another_method():
    assert str(TatTrainConfig.model_fields["patch_dropout"].description).startswith("CHANGES THE METHOD")


def test_patch_dropout_without_a_tower_for_it_is_found_before_work_starts(make_tiny_model_dir, tmp_path):
    model = f"local-dir:{make_tiny_model_dir(tmp_path / 'timm', vision='timm')}"
    lora = {"r": 2, "target_modules": ["q_proj"]}
    assert inspect_model._function(model, None, lora=lora).model == model
    with pytest.raises(CirError, match=r"patch_dropout 0.5 needs open_clip's VisionTransformer"):
        inspect_model._function(model, None, lora=lora, patch_dropout=0.5)
