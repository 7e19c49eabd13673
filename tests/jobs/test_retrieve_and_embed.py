"""embed and batch_retrieve on a real cluster: from pictures to scores, reused, resumed, and refused when they must be."""

import json
import signal
import subprocess
import time
from pathlib import Path

import mlflow
import numpy as np
import open_clip
import psutil
import pytest
import torch
from safetensors.torch import save_file

from cir_core.benchmarks import load_benchmark
from cir_core.embedding_store import EmbeddingStore
from cir_core.encoders import load_encoder
from cir_core.evaluation import evaluate, load_ranking
from cir_core.preprocessing import preprocess_image
from cir_core.scenes import write_benchmark, write_pairs
from cir_core.shards import read_shard, write_tar_shard

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(str(folder), 500, shard_rows=100)
    return folder


@pytest.fixture(scope="module")
def benchmark_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmark")
    for split in ("val", "test"):
        write_benchmark(str(root), split, 24, shard_rows=60)
    return root


def embed(servers, data, output, model, *more):
    return servers.run("embed", "--data", str(data), "--output", str(output), "--model", f"local-dir:{model}", *more)


WITH_CAPTIONS = ("--captions", "embed", "--batch_size", "64")


@pytest.fixture(scope="module")
def whole_store(servers, pairs, tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    done = embed(servers, pairs, folder, tiny_model_dir, *WITH_CAPTIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_store_holds_what_the_encoder_says(servers, pairs, tiny_model_dir, whole_store):
    store = EmbeddingStore.open(str(whole_store))
    encoder = load_encoder(f"local-dir:{tiny_model_dir}")
    rows = [row for shard in sorted(pairs.iterdir()) for row in read_shard(str(shard))]
    blocks = list(store.iter_blocks(columns=("caption", "caption_embedding")))
    assert [one for block in blocks for one in block.ids] == [row.key for row in rows]
    assert [text for block in blocks for text in block.columns["caption"]] == [row.caption for row in rows]
    images = torch.stack([torch.from_numpy(preprocess_image(row.image, encoder.preprocessing)) for row in rows])
    expected = encoder.encode_images(images).numpy()
    assert np.concatenate([block.embeddings for block in blocks]) == pytest.approx(expected, abs=1e-5)
    texts = np.concatenate([block.columns["caption_embedding"] for block in blocks])
    assert texts == pytest.approx(encoder.encode_texts([row.caption for row in rows]).numpy(), abs=1e-5)
    again = embed(servers, pairs, whole_store, tiny_model_dir, *WITH_CAPTIONS)
    assert again.returncode == 0
    assert "reused" in again.stdout


def test_an_image_folder_is_embedded(servers, pairs, tiny_model_dir, tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    rows = list(read_shard(str(pairs / "00000.tar")))
    for row in rows[:20]:
        (pictures / "sub" / f"{row.key}.jpg").write_bytes(row.image)
    (pictures / "broken.png").write_bytes(b"not a picture")
    done = embed(servers, pictures, tmp_path / "store", tiny_model_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    store = EmbeddingStore.open(str(tmp_path / "store"))
    assert (store.num_rows, store.manifest.num_rejects) == (20, 1)


@pytest.mark.long
def test_a_killed_embedding_goes_on_and_ends_the_same(servers, pairs, tiny_model_dir, tmp_path, whole_store):
    cut = tmp_path / "cut"
    model = f"local-dir:{tiny_model_dir}"
    command = servers.command("embed", "--data", str(pairs), "--output", str(cut), "--model", model, *WITH_CAPTIONS)
    process = subprocess.Popen(command, env=servers.environment(), cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(cut.glob("_progress/part-*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for worker in psutil.process_iter():
        if "ShardEmbedder" in worker.name():
            worker.kill()
    assert not (cut / "manifest.json").exists()
    done = embed(servers, pairs, cut, tiny_model_dir, *WITH_CAPTIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on with the rest" in done.stdout
    digests = [[part.sha256 for part in EmbeddingStore.open(str(uri)).parts] for uri in (whole_store, cut)]
    assert digests[0] == digests[1]


def retrieve(servers, root, *more, adapter="none"):
    return servers.run("batch_retrieve", "--root", str(root), "--adapter", adapter, "--contact_sheet_rows", "5", *more)


def test_scores_do_not_depend_on_shards_and_are_rescored_from_disk(servers, benchmark_root, tiny_model_dir):
    benchmark = load_benchmark("scenes", str(benchmark_root), split="test")
    model = ("--model", f"local-dir:{tiny_model_dir}")
    scores = []
    for shards in (1, 3):
        name = f"shards-{shards}"
        done = retrieve(servers, benchmark_root, *model, "--num_shards", str(shards), "--name", name)
        assert done.returncode == 0, done.stderr[-3000:]
        folder = servers.storage / "batch_retrieve" / name
        scores.append(json.loads((folder / "scores.json").read_text()))
    assert "reused" in done.stdout
    strip = [[(row["method"], row["alpha"], row["metrics"]) for row in found] for found in scores]
    assert strip[0] == strip[1]
    by_alpha = load_ranking(str(folder / "rankings" / "base_model" / "slerp.parquet"))
    saved = {row["alpha"]: row["metrics"] for row in scores[1] if row["method"] == "slerp"}
    assert {
        alpha: evaluate(ranking, benchmark, num_resamples=100).metrics for alpha, ranking in by_alpha.items()
    } == saved
    page = next(line for line in done.stdout.splitlines() if line.startswith("MLflow: "))
    client = mlflow.MlflowClient(servers.tracking_uri)
    parent = client.get_run(page.rsplit("/", 1)[-1])
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"alpha.png", "contact_sheet.html", "per_query.json", "scores.json", "rankings"} <= artifacts
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    (slerp,) = [child for child in children if child.data.params["method"] == "slerp"]
    curve = client.get_metric_history(slerp.info.run_id, "sweep/recall_at_10")
    assert sorted(item.step for item in curve) == list(range(0, 101, 10))
    (chosen,) = [row for row in scores[1] if row["method"] == "slerp" and row["chosen"]]
    assert float(slerp.data.params["alpha"]) == chosen["alpha"]
    assert slerp.data.metrics["recall_at_10"] == chosen["metrics"]["recall@10"]
    assert slerp.data.params["alpha_source"] == "alpha chosen on split 'val'"


def test_a_gallery_with_an_unreadable_image_is_refused(servers, tiny_model_dir, tmp_path):
    write_benchmark(str(tmp_path), "test", 4)
    shard = tmp_path / "test" / "gallery" / "00000.tar"
    rows = list(read_shard(str(shard)))
    rewritten = [(row.key, b"broken" if n == 7 else row.image, "jpg", row.caption) for n, row in enumerate(rows)]
    write_tar_shard(str(shard), rewritten)
    done = retrieve(servers, tmp_path, "--model", f"local-dir:{tiny_model_dir}", "--select_split", "")
    assert done.returncode == 2
    assert rows[7].key in done.stderr


@pytest.fixture(scope="module")
def vit_b_32(tmp_path_factory):
    """ViT-B-32 with random weights, saved as a user would save a model: open_clip's local-dir form."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", load_weights=False)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": model.visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.long
def test_vit_b_32_goes_through_all_three_jobs(servers, vit_b_32, tmp_path):
    write_pairs(str(tmp_path / "pairs"), 24)
    model = f"local-dir:{vit_b_32}"
    trained = servers.run(
        "tat_train", "--data", str(tmp_path / "pairs"), "--model", model, "--global_batch_size", "12",
        "--gap_samples", "8", "--name", "vit", "--experiment", "vit",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-3000:]
    result = json.loads((servers.storage / "tat_train" / "vit" / "result.json").read_text())
    assert result["trainable_fraction"] < 0.005
    stored = embed(servers, tmp_path / "pairs", tmp_path / "store", vit_b_32, "--adapter", result["adapter_uri"])
    assert stored.returncode == 0, stored.stderr[-3000:]
    ids = EmbeddingStore.open(str(tmp_path / "store")).read_ids()
    assert len(ids) == 24
    queries = [{"query_id": "q", "reference": ids[0], "relative_caption": "make it red"}]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    found = servers.run(
        "batch_retrieve", "--benchmark", "custom", "--queries", str(tmp_path / "queries.jsonl"), "--gallery",
        str(tmp_path / "store"), "--experiment", "vit", "--k", "5",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    assert "trying that of the newest tat_train run vit" in found.stdout


@pytest.mark.parametrize(
    ("job", "given", "message"),
    [
        ("embed", ["--output", "x"], "--data is needed"),
        ("embed", ["--data", "/nowhere"], "/nowhere"),
        ("embed", ["--data", "{pairs}", "--model", "scenes-tinny"], "scenes-tiny"),
        ("embed", ["--data", "{pairs}", "--batch_size", "0"], "batch_size"),
        ("embed", ["--data", "{pairs}", "--adapter", "/nowhere/adapter"], "/nowhere/adapter"),
        ("batch_retrieve", ["--benchmark", "scene"], "scenes"),
        ("batch_retrieve", ["--alphas", "[1.5]"], "alphas"),
        ("batch_retrieve", ["--methods", "[slurp]"], "slerp"),
        ("batch_retrieve", ["--experiment", "empty"], "no finished tat_train run"),
        ("batch_retrieve", ["--adapter", "none", "--k", "5"], "--k 5"),
        ("batch_retrieve", ["--protocol", '{"referense": "kept"}', "--adapter", "none"], "did you mean 'reference'"),
        ("batch_retrieve", ["--protocol", '{"split": "val"}', "--adapter", "none"], "unknown option 'split' of scenes"),
        ("batch_retrieve", ["--benchmark", "cirr", "--adapter", "none"], "--root is needed"),
        ("batch_retrieve", ["--queries", "q.jsonl"], "--queries does nothing with --benchmark scenes"),
        ("batch_retrieve", ["--gallery_captions", "c.jsonl", "--adapter", "none"], "without --gallery_alpha"),
    ],
)
def test_mistakes_are_found_before_work_starts(servers, pairs, job, given, message):
    refused = servers.run(job, *[text.replace("{pairs}", str(pairs)) for text in given])
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not Path(servers.storage, "x").exists()
