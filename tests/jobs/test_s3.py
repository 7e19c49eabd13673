"""The jobs with everything in S3, on a real S3 server: what they write there, and what they say when it is not theirs."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import mlflow
import numpy as np
import pytest
import torch

from cir_core import files
from cir_core.embedding_store import EmbeddingStore
from cir_core.encoders import load_encoder
from cir_core.preprocessing import preprocess_image
from cir_core.scenes import write_pairs
from cir_core.shards import index_image_folder, read_shard, read_slice

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NUM_PAIRS = 60


@pytest.fixture(scope="module", autouse=True)
def in_s3(s3):
    """The tests themselves look into the bucket."""
    with mock.patch.dict(os.environ, s3.environment):
        yield


@pytest.fixture(scope="module")
def pairs(s3):
    folder = f"{s3.bucket_uri}/jobs/pairs"
    write_pairs(folder, NUM_PAIRS, shard_rows=20)
    return folder


def keys(uri: str) -> list[str]:
    return [item.name for item in files.list_files(uri)]


def test_embed_reads_and_writes_s3(servers, s3, pairs, tiny_model_dir):
    store = f"{s3.bucket_uri}/jobs/store"
    job = (
        "embed",
        "--data",
        f"{pairs}/{{00000..00002}}.tar",
        "--output",
        store,
        "--model",
        f"local-dir:{tiny_model_dir}",
    )
    done = servers.run(*job)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "manifest.json" in keys(store)
    rows = [row for number in range(3) for row in read_shard(f"{pairs}/{number:05d}.tar")]
    assert len(rows) == NUM_PAIRS
    blocks = list(EmbeddingStore.open(store).iter_blocks())
    assert [name for block in blocks for name in block.ids] == [row.key for row in rows]
    encoder = load_encoder(f"local-dir:{tiny_model_dir}")
    images = torch.stack([torch.from_numpy(preprocess_image(row.image, encoder.preprocessing)) for row in rows])
    embeddings = np.concatenate([block.embeddings for block in blocks])
    assert embeddings == pytest.approx(encoder.encode_images(images).numpy(), abs=1e-5)
    before = keys(store)
    again = servers.run(*job)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "reused" in again.stdout
    assert keys(store) == before


@pytest.mark.long
def test_a_run_whose_storage_path_is_in_s3_leaves_nothing_elsewhere(servers, s3, tiny_model_dir, monkeypatch, tmp_path):
    """Generated shards, checkpoints and adapter of tat_train; then the gallery, stores and rankings of batch_retrieve."""
    runs = f"{s3.bucket_uri}/jobs/runs"
    local = sorted(servers.storage.rglob("*"))
    model = ("--storage_path", runs, "--model", f"local-dir:{tiny_model_dir}", "--name", "in-s3")
    small = ("--num_pairs", "64", "--global_batch_size", "16", "--gap_samples", "16", "--checkpoint_every_steps", "2")
    trained = servers.run("tat_train", *model, *small)
    assert trained.returncode == 0, trained.stderr[-3000:]
    found = keys(f"{runs}/tat_train/in-s3")
    assert {"result.json", "adapter/adapter_model.safetensors", "merged/open_clip_model.safetensors"} <= set(found)
    assert any(name.startswith("state/step-00000004/") for name in found)
    adapter = ("--adapter", f"{runs}/tat_train/in-s3/adapter")
    retrieved = servers.run("batch_retrieve", *model, *adapter, "--num_queries", "10", "--contact_sheet_rows", "2")
    assert retrieved.returncode == 0, retrieved.stderr[-3000:]
    assert "result.json" in keys(f"{runs}/batch_retrieve/in-s3")
    assert (
        len([name for name in keys(f"{runs}/stores") if name.endswith("manifest.json")]) == 4
    )  # two models, two splits
    assert {name.split("/")[0] for name in keys(f"{runs}/data")} == {
        "scenes-pairs-64-seed0",
        "scenes-benchmark-10-seed0",
    }
    assert sorted(servers.storage.rglob("*")) == local


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--data", "s3://no-such-bucket/pairs/"), "s3://no-such-bucket/pairs/: no such file, folder or bucket"),
        (("--data", "{pairs}", "--output", "s3://no-such-bucket/store"), "s3://no-such-bucket/store"),
        (("--data", "{pairs}/00009.tar"), "pairs/00009.tar: no such file"),
    ],
)
def test_what_is_not_there_is_named(servers, pairs, given, named):
    refused = servers.run("embed", *[text.replace("{pairs}", pairs) for text in given])
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert named in refused.stderr
    assert "Traceback" not in refused.stderr


def test_each_listed_key_opens_as_it_stands(s3):
    """Tools that mirror web pages write such names."""
    folder = f"{s3.bucket_uri}/odd names"
    keys_there = ["a b.jpg", "b%20c.jpg", "photo?id=3&size=2.jpg", "photo?id=3.jpg", "x?region=r/y.jpg", "x?y.jpg"]
    for name in keys_there:
        files.write_bytes(files.join(folder, name), name.encode())
    listed = files.list_files(folder)
    assert [file.name for file in listed] == keys_there
    assert [files.read_bytes(file.uri).decode() for file in listed] == keys_there
    assert [files.redact(file.uri) for file in listed] == [f"{folder}/{name}" for name in keys_there]
    index = index_image_folder(folder, 10, captions=False)
    rows = [row for part in index.slices for row in read_slice(part, require_caption=False)]
    assert [(row.key, row.image.decode()) for row in rows] == [(name, name) for name in keys_there]


def test_wrong_keys_are_told_without_showing_them(servers, s3, pairs):
    wrong = "0123456789abcdef" + s3.environment["AWS_SECRET_ACCESS_KEY"][16:]
    refused = servers.run_alone("embed", "--data", pairs, AWS_SECRET_ACCESS_KEY=wrong)
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert f"{pairs}: access refused" in refused.stderr
    assert "check the credentials" in refused.stderr
    assert "Traceback" not in refused.stderr
    for secret in (wrong, *secrets_of(s3)):
        assert secret not in refused.stdout + refused.stderr


def secrets_of(s3) -> list[str]:
    return [s3.environment["AWS_ACCESS_KEY_ID"], s3.environment["AWS_SECRET_ACCESS_KEY"]]


def test_no_key_is_in_a_log_a_record_or_mlflow(servers, s3, pairs, tiny_model_dir):
    """The last test of this file: everything before it has been logged."""
    done = servers.run("embed", "--data", pairs, "--model", f"local-dir:{tiny_model_dir}", "--captions", "text")
    assert done.returncode == 0, done.stderr[-3000:]
    client = mlflow.MlflowClient(servers.tracking_uri)
    experiment = client.get_experiment_by_name("slerp-tat")
    assert any(run.data.params.get("data") == pairs for run in client.search_runs([experiment.experiment_id]))
    kept = s3.run_dir / "s3"  # its key file, and its objects, which are searched below
    looked_into = 0
    for folder in (servers.home, servers.ray_folder, servers.storage):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_relative_to(kept):
                assert_free_of(path, secrets_of(s3))
                looked_into += 1
    assert looked_into > 20
    for item in files.list_files(f"{s3.bucket_uri}/jobs"):
        content = files.read_bytes(item.uri)
        assert not any(secret.encode() in content for secret in secrets_of(s3)), item.uri


def assert_free_of(path: Path, secrets: list[str]) -> None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return  # a file of Ray's that came and went
    assert not any(secret.encode() in content for secret in secrets), path
