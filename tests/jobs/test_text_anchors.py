"""Cached text anchors on a real cluster: the losses of a run without them, through kills, and never those of other captions."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from safetensors.numpy import load_file

from cir_core.embedding_store import EmbeddingStore
from cir_core.encoders import load_encoder
from cir_core.lora import weights_digest
from cir_core.scenes import write_pairs
from cir_core.schema import CirError
from cir_core.shards import index_shard, read_captions, read_slice, write_parquet_shard, write_tar_shard
from jobs.models import ModelInfo
from jobs.storage import RunFolder
from jobs.tat_train import TatTrainConfig
from jobs.text_anchors import anchor_spec, make_anchors, run_anchors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NUM_PAIRS, BATCH, SHARD_ROWS = 1000, 16, 50
STEPS = 63  # 1000 / 16, rounded up


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Good pairs in 20 shards, and a shard with an unreadable image, a caption that is missing and no image at all."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(str(folder), NUM_PAIRS - 1, shard_rows=SHARD_ROWS)
    bad = [("html", b"<html>not found</html>", "jpg", "a page"), ("mute", b"x", "jpg", None), ("empty", b"", "jpg", "")]
    write_tar_shard(str(folder / "99999.tar"), bad)
    return folder


def arguments(pairs, model, name, **changed):
    settings = {
        "data": str(pairs),
        "model": f"local-dir:{model}",
        "name": name,
        "global_batch_size": BATCH,
        "gap_samples": 64,
        "checkpoint_every_steps": 8,
        "log_every_steps": 1,
        "record_samples": "true",
        "lr": 1e-3,
        "lora_dropout": 0,  # each worker draws its own, so with it two do not equal one
        **changed,
    }
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


class Run:
    """What a run left in its folder."""

    def __init__(self, storage, name):
        self.folder = Path(storage) / "tat_train" / name
        self.result = json.loads((self.folder / "result.json").read_text())
        self.adapter = hashlib.sha256((self.folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        self.merged = load_file(self.folder / "merged" / "open_clip_model.safetensors")
        files = sorted((self.folder / "samples").glob("*.parquet"))
        self.samples = sorted(tuple(row.values()) for file in files for row in pq.read_table(file).to_pylist())

    def losses(self):
        return [row["loss"] for row in self.result["history"]]


@pytest.fixture(scope="module")
def cached(servers, pairs, tiny_model_dir):
    given = arguments(pairs, tiny_model_dir, "cached", cache_text_anchors="true")
    done = servers.run("tat_train", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{NUM_PAIRS} captions\n" in done.stdout
    return Run(servers.storage, "cached")


@pytest.mark.long
def test_the_losses_are_those_of_a_run_without_the_cache(servers, pairs, tiny_model_dir, cached):
    """Rejects, samples, modality gap and the text tower are the same as well."""
    done = servers.run("tat_train", *arguments(pairs, tiny_model_dir, "plain"))
    assert done.returncode == 0, done.stderr[-3000:]
    plain = Run(servers.storage, "plain")
    assert len(plain.losses()) == STEPS
    assert cached.losses() == pytest.approx(plain.losses(), abs=1e-5)
    assert cached.samples == plain.samples
    assert len({sample[1:] for sample in cached.samples}) == len(cached.samples) == NUM_PAIRS
    for key in ("rejects_structural", "rejects_images", "trainable_fraction", "num_parameters", "samples_seen"):
        assert cached.result[key] == plain.result[key]
    assert (cached.result["rejects_structural"], cached.result["rejects_images"]) == (2, 1)
    for moment in ("gap_before", "gap_after"):
        assert cached.result[moment] == pytest.approx(plain.result[moment], abs=1e-5)
    base = load_file(tiny_model_dir / "open_clip_model.safetensors")
    for run in (cached, plain):
        assert run.merged.keys() == base.keys()
        text = [name for name in base if not name.startswith("visual.")]
        assert text
        assert all(np.array_equal(run.merged[name], base[name]) for name in text)
    tuned = [load_encoder(f"local-dir:{run.folder / 'merged'}").model for run in (cached, plain)]
    assert weights_digest(tuned[0], without="visual.") == weights_digest(tuned[1], without="visual.")
    assert any(not np.array_equal(cached.merged[name], base[name]) for name in base)


@pytest.mark.long
def test_the_store_holds_every_caption_once_and_two_workers_use_it_again(servers, pairs, tiny_model_dir, cached):
    (folder,) = (servers.storage / "anchors").iterdir()
    store = EmbeddingStore.open(str(folder))
    assert store.verify() == []
    shards = sorted(str(path) for path in pairs.glob("*.tar"))
    wanted = [pair for shard in shards for pair in read_captions(shard)]
    blocks = [store.read_rows(part.index, 0, part.num_rows, ("caption",)) for part in store.parts]
    held = [pair for one in blocks for pair in zip(one.ids, one.columns["caption"], strict=True)]
    assert held == wanted
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    two = {"num_workers": 2, "cpus_per_worker": 0.25}
    again = servers.run("tat_train", *arguments(pairs, tiny_model_dir, "two", cache_text_anchors="true", **two))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "captions, reused" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == made
    run = Run(servers.storage, "two")
    assert {row["num_workers"] for row in run.result["history"]} == {2}
    assert run.losses() == pytest.approx(cached.losses(), abs=1e-5)
    assert run.samples == cached.samples


@pytest.mark.long
def test_a_run_does_not_change_over_to_the_cache(servers, pairs, tiny_model_dir, cached):
    refused = servers.run("tat_train", *arguments(pairs, tiny_model_dir, "cached", cache_text_anchors="false"))
    assert refused.returncode == 2
    assert "cache_text_anchors: True -> False" in refused.stderr


def kill_when(ready, servers, storage, given):
    """Start a run, SIGKILL its driver as soon as `ready()`, and wait until the job's actors are gone too."""
    before = {process.pid for process in actors()}
    with (servers.storage / "killed.log").open("a") as log:
        process = subprocess.Popen(
            servers.command("tat_train", *given), env=servers.environment(), cwd=storage, stdout=log, stderr=log
        )
        deadline = time.monotonic() + 240
        while not ready():
            assert process.poll() is None, (servers.storage / "killed.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    while {process.pid for process in actors()} - before:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def actors():
    """Return the embedding and training actors of the tests' cluster."""
    found = psutil.process_iter(["cmdline"])
    titles = ("ray::RayTrainWorker", "ray::MapWorker", "ray::_MapWorker", "CaptionEmbedder")
    return [process for process in found if any(title in " ".join(process.info["cmdline"] or []) for title in titles)]


@pytest.mark.long
def test_kills_while_captions_are_embedded_and_while_training_change_nothing(
    servers, pairs, tiny_model_dir, cached, tmp_path
):
    given = arguments(pairs, tiny_model_dir, "killed", cache_text_anchors="true", storage_path=tmp_path)
    kill_when(lambda: any(tmp_path.glob("anchors/*/_progress/part-*.json")), servers, tmp_path, given)
    assert not any(tmp_path.glob("anchors/*/manifest.json"))
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("anchors/*/part-*.parquet")}
    markers = len(list(tmp_path.glob("anchors/*/_progress/part-*.json")))
    assert 0 < markers < NUM_PAIRS // SHARD_ROWS + 1
    marked = {path for path in finished if (path.parent / "_progress" / f"{path.stem}.json").exists()}

    kill_when(lambda: any(tmp_path.glob("tat_train/killed/state/step-*16/*.safetensors")), servers, tmp_path, given)
    assert {path: path.stat().st_mtime_ns for path in marked} == {path: finished[path] for path in marked}
    done = servers.run("tat_train", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "captions, reused" in done.stdout
    assert "going on after step" in done.stdout
    run = Run(tmp_path, "killed")
    assert run.adapter == cached.adapter
    assert run.samples == cached.samples
    assert run.losses() == cached.losses()


@pytest.fixture(scope="module")
def connected(servers):
    if not ray.is_initialized():
        ray.init(address=servers.ray_address, log_to_driver=False, logging_level="WARNING")


def make(shards, model_dir, storage, precision="fp32"):
    """Make the anchors of shards; returns them with the shards' indexes."""
    model = f"local-dir:{model_dir}"
    encoder = load_encoder(model, device="cpu")
    info = ModelInfo(model, None, None, encoder.details, encoder.preprocessing)
    indexes = [index_shard(shard) for shard in shards]
    spec = anchor_spec(encoder.details, precision, shards)
    anchors = make_anchors(
        indexes, info, spec, storage_uri=str(storage), num_actors=(1, 2), cpus_per_actor=0.5, use_gpu=False,
    )  # fmt: skip
    return anchors, indexes


@pytest.mark.long
def test_a_changed_shard_is_embedded_anew_and_never_mixed(connected, tiny_model_dir, tmp_path):
    rows = [(f"key{n}", b"an image", "jpg", f"picture {n} with a red circle") for n in range(9)]
    other = [(key, image, suffix, caption.replace("red", "tan")) for key, image, suffix, caption in rows]
    shards = [str(tmp_path / "a.tar"), str(tmp_path / "b.parquet")]
    write_tar_shard(shards[0], rows)
    write_parquet_shard(shards[1], rows)  # the same keys as in the other shard
    old, indexes = make(shards, tiny_model_dir, tmp_path)
    (part,) = indexes[0].slices
    samples = list(read_slice(part))
    wanted = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu").encode_texts([row.caption for row in samples])
    assert np.abs(old.read(shards[0], samples[3:7]) - wanted[3:7].numpy()).max() < 1e-6
    assert old.read(shards[1], list(read_slice(indexes[1].slices[0]))) == pytest.approx(wanted.numpy(), abs=1e-6)

    before = Path(shards[0]).stat()
    write_tar_shard(shards[0], other)
    assert Path(shards[0]).stat().st_size == before.st_size  # and it reads without complaint: only the captions tell
    with pytest.raises(CirError, match=r"a\.tar: the text anchors of rows 0 to 8 .* were made of other captions"):
        old.read(shards[0], list(read_slice(part)))
    new, _ = make(shards, tiny_model_dir, tmp_path)
    assert new.store.uri != old.store.uri
    assert new.read(shards[0], list(read_slice(part))).shape == (9, old.dim)

    os.utime(
        shards[0], ns=(before.st_mtime_ns, before.st_mtime_ns)
    )  # the listing of the first run, but not its captions
    back, _ = make(shards, tiny_model_dir, tmp_path)
    assert back.store.uri == old.store.uri
    with pytest.raises(CirError, match="made of other captions"):
        back.read(shards[0], list(read_slice(part)))


def test_what_decides_an_anchor_is_in_its_identity(make_tiny_model_dir, tmp_path):
    shard = str(tmp_path / "a.tar")
    write_tar_shard(shard, [("key", b"an image", "jpg", "a red circle")])
    one, two = (load_encoder(f"local-dir:{make_tiny_model_dir(tmp_path / str(n), seed=n)}").details for n in range(2))
    specs = [
        anchor_spec(one, "fp32", [shard]),
        anchor_spec(one, "bf16", [shard]),
        anchor_spec(two, "fp32", [shard]),
        anchor_spec(replace(one, tokenizer_digest="another"), "fp32", [shard]),
        anchor_spec(replace(one, config_digest="another"), "fp32", [shard]),
    ]
    os.utime(shard, (1, 1))
    specs.append(anchor_spec(one, "fp32", [shard]))
    assert len({spec.identity for spec in specs}) == len(specs)


@pytest.mark.long
def test_a_resumed_run_keeps_the_anchors_it_began_with(connected, tiny_model_dir, tmp_path):
    """bf16 is the default on a GPU, which a resumed run may leave; another tokenizer is refused."""
    shard = str(tmp_path / "a.tar")
    write_tar_shard(shard, [("key", b"an image", "jpg", "a red circle")])
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    folder = RunFolder(str(tmp_path), "tat_train", "run")
    config = TatTrainConfig(storage_path=str(tmp_path), cache_text_anchors=True, precision="bf16", model="local-dir:x")

    def run(precision):
        encoder = load_encoder(f"local-dir:{model}", device="cpu")
        info = ModelInfo(f"local-dir:{model}", None, None, encoder.details, encoder.preprocessing)
        return run_anchors(config.model_copy(update={"precision": precision}), folder, info, [index_shard(shard)])

    begun = run("bf16")
    assert run("auto").store.identity == begun.store.identity
    assert begun.store.manifest.spec.precision == "bf16"
    rules = json.loads((model / "tokenizer.json").read_text())
    rules["normalizer"] = None
    (model / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(CirError, match="began with other text anchors"):
        run("bf16")


@pytest.mark.long
def test_a_shard_that_changes_while_it_is_embedded_stops_the_run(connected, tiny_model_dir, tmp_path):
    shard = str(tmp_path / "a.tar")
    rows = [(f"key{n}", b"an image", "jpg", "a red circle") for n in range(9)]
    write_tar_shard(shard, rows)
    encoder = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    info = ModelInfo(f"local-dir:{tiny_model_dir}", None, None, encoder.details, encoder.preprocessing)
    index, spec = index_shard(shard), anchor_spec(encoder.details, "fp32", [shard])
    settings = {"num_actors": (1, 1), "cpus_per_actor": 0.5, "use_gpu": False}
    write_tar_shard(shard, rows[:5])
    with pytest.raises(Exception, match="holds 5 samples where 9 were counted"):
        make_anchors([index], info, spec, storage_uri=str(tmp_path), **settings)
    write_tar_shard(shard, rows)
    with pytest.raises(CirError, match="were changed while their captions were embedded"):
        make_anchors([index], info, spec, storage_uri=str(tmp_path), **settings)
    assert not any(tmp_path.glob("anchors/*/manifest.json"))
