"""What a store or a run was made from: files that were moved or written again are another input."""

import json
import os
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from cir_core.embedding_store import EmbeddingWriter, StoreSpec
from cir_core.encoders import load_encoder
from cir_core.schema import CirError, Reject
from jobs import embedding
from jobs.config import resolve_precision
from jobs.embedder import EmbedPlan
from jobs.embedding import embed_stores, find_units, store_spec, store_uri
from jobs.models import inspect_model
from jobs.storage import RunFolder
from jobs.training_job import check_same_data

SPEC = StoreSpec("m", "w", "d", "", "c", "t", "crop", 2, "float32", "i", "fp32")


def folder_with(path, text):
    path.mkdir()
    (path / "00000.tar").write_bytes(text)
    os.utime(path / "00000.tar", (1, 1))
    return str(path)


def test_two_splits_with_equal_names_and_sizes_are_two_inputs(tmp_path):
    val, test = folder_with(tmp_path / "val", b"one"), folder_with(tmp_path / "test", b"two")
    assert find_units(val)[1] == find_units(val)[1]
    assert find_units(val)[1] != find_units(test)[1]


def test_a_shard_written_again_is_another_input(tmp_path):
    data = folder_with(tmp_path / "val", b"one")
    before = find_units(data)[1]
    (tmp_path / "val" / "00000.tar").write_bytes(b"two")
    assert find_units(data)[1] != before


def test_a_relative_path_is_the_same_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_units(folder_with(tmp_path / "val", b"one"))[1] == find_units("val")[1]


def test_a_folder_of_many_images_is_held_once_and_a_list_is_advised(tmp_path, monkeypatch, capsys):
    count = 5000
    for number in range(count):
        (tmp_path / f"{number:012}.jpg").write_bytes(b"x")
    find_units(str(tmp_path))  # imports are over
    assert "list of their URIs" not in capsys.readouterr().out
    monkeypatch.setattr("jobs.embedding._MANY_FILES", count - 1)
    tracemalloc.start()
    try:
        units, _ = find_units(str(tmp_path), captions=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(unit.files.num_rows for unit in units) == count
    assert peak / count < 600  # bytes a name, the listing and the slices together
    assert f"{tmp_path} holds 5000 images" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_shards(tmp_path):
    shards = [folder_with(tmp_path / "a", b"one") + "/00000.tar"]
    folder = RunFolder(str(tmp_path), "tat_train", "run")
    check_same_data(folder, shards)
    check_same_data(folder, shards)
    (tmp_path / "a" / "00000.tar").write_bytes(b"two")
    with pytest.raises(CirError, match="changed since run run began"):
        check_same_data(folder, shards)


def test_models_with_equal_weights_and_another_activation_make_two_stores(make_tiny_model_dir, tmp_path):
    identities = []
    for name, quick_gelu in (("plain", False), ("quick", True)):
        folder = make_tiny_model_dir(tmp_path / name)
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["quick_gelu"] = quick_gelu
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        details = load_encoder(f"local-dir:{folder}").details
        spec = store_spec(details, dtype="float32", captions="no", input_digest="same")
        identities.append((spec.weights_digest, spec.config_digest))
    assert identities[0][0] == identities[1][0]
    assert identities[0][1] != identities[1][1]


def test_another_precision_makes_another_store(make_tiny_model_dir, tmp_path):
    """A driver checks the model on a CPU, whatever its encoders run on: it says what "auto" is to them."""
    assert [resolve_precision("auto", use_gpu=gpu) for gpu in (False, True)] == ["fp32", "bf16"]
    assert resolve_precision("fp32", use_gpu=True) == "fp32"
    model, specs = f"local-dir:{make_tiny_model_dir(tmp_path / 'model')}", []
    for precision in ("fp32", "bf16"):
        details = inspect_model._function(model, None, precision=precision).details
        specs.append(store_spec(details, dtype="float32", captions="no", input_digest="same"))
    assert [spec.precision for spec in specs] == ["fp32", "bf16"]
    assert specs[0].differences(specs[1]) == "precision: 'bf16' there, 'fp32' here"
    assert store_uri(str(tmp_path), specs[0]) != store_uri(str(tmp_path), specs[1])


def test_parts_of_a_folder_that_was_cut_otherwise_are_refused(tmp_path, monkeypatch):
    """Such as by a version of this code with larger parts: a row between the cuts would be in no part."""
    monkeypatch.setattr(embedding, "_run", lambda *_: pytest.fail("it embeds"))
    monkeypatch.setattr(embedding, "_FOLDER_ROWS", 2)
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    units, digest = find_units(str(tmp_path))
    plan = EmbedPlan(
        units=tuple(units), output=str(tmp_path / "store"), spec=replace(SPEC, input_digest=digest), model="m",
        pretrained=None, adapter=None, preprocessing_mode=None, captions="no", batch_size=1, use_gpu=False,
    )  # fmt: skip
    writer = EmbeddingWriter(plan.output, plan.spec)
    rejects = [Reject("x", "b.jpg", "unreadable")]
    writer.write_part(0, ["a.jpg"], np.float32([[1, 0]]), rejects=rejects)
    writer.write_part(1, ["d.jpg"], np.float32([[1, 0]]))
    with pytest.raises(CirError, match=r"part-00001 has 1 rows and 0 rejects of .*, which has 2 there"):
        embed_stores([plan], num_encoders=1, max_rejects=None)
    writer.write_part(1, ["c.jpg", "d.jpg"], np.float32([[1, 0], [0, 1]]))
    (store,) = embed_stores([plan], num_encoders=1, max_rejects=None)
    assert (store.num_rows, store.manifest.num_rejects) == (3, 1)
