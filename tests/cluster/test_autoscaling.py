"""Ray's autoscaler (v2) with machines that are processes: jobs make a cluster of none grow, and it shrinks again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import network
import numpy as np
import processes
import pytest
import ray_nodes
import s3_server
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from cir_core import files
from cir_core.embedding_store import EmbeddingStore, EmbeddingWriter
from cir_core.encoders import load_encoder
from cir_core.scenes import write_pairs
from jobs.embedding import store_spec

MOST = 3
CONFIG = {
    "cluster_name": "test",
    "max_workers": 2 * MOST,
    "idle_timeout_minutes": 0.2,
    "provider": {
        "type": "external",  # the wheel lacks the defaults of "fake_multinode"
        "module": "fake_nodes.NodesWithMemory",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": "10.231.7.10:6379",
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "decode": {
            "resources": {"CPU": 2, "object_store_memory": 200_000_000, "memory": 110_000_000},
            "labels": {"slerp-tat/pool": "decode"},
            "node_config": {},
            "min_workers": 0,
            "max_workers": MOST,
        },
        "gpu": {  # what Ray is told of a machine, which has none
            "resources": {"CPU": 2, "GPU": 1, "object_store_memory": 200_000_000, "memory": 110_000_000},
            "labels": {"slerp-tat/pool": "gpu"},
            "node_config": {},
            "min_workers": 0,
            "max_workers": MOST,
        },
    },
}
NOTHING = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands",
           "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")  # fmt: skip
CONFIG |= {key: [] for key in NOTHING} | {"auth": {}, "file_mounts": {}, "upscaling_speed": 1.0}
VARIABLES = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "PYTHONPATH": str(Path(__file__).parent),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("iptables") is None, reason="needs root and iptables"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A head with the autoscaler and no worker is up; the run folder."""
    run_dir = tmp_path_factory.mktemp("autoscaling")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIR_RUN_DIR", str(run_dir))
        (run_dir / "autoscaling.json").write_text(json.dumps(CONFIG))
        state = processes.load_state()
        try:
            environment = network.start_around(state) | VARIABLES
            for name, value in s3_server.load_server(network.HERE).environment().items():
                patch.setenv(name, value)
            network.start_node(state, "head", environment, 0, f"--autoscaling-config={run_dir / 'autoscaling.json'}")
            yield run_dir
        finally:
            network.down()


def workers(pool: str = "") -> int:
    """Return how many workers there are, or how many of a pool."""
    found = [node["labels"].get("slerp-tat/pool", "") for node in alive("nodes") if not node["is_head_node"]]
    return len([label for label in found if pool in ("", label)])


def actors(name: str) -> int:
    return sum(name in actor["class_name"] for actor in alive("actors"))


def alive(kind: str) -> list[dict[str, Any]]:
    return ray_nodes.listed(network.URL, kind, token=network.token_file().read_text())


def follow(
    folder: Path, actor: str, *entrypoint: str, pool: str = "decode", fails_with: str = ""
) -> tuple[list[int], int]:
    """Submit a job; return the number of a pool's workers each time it changed, and the most actors of a name at once.

    fails_with: what a job that must fail says.
    """
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": network.token_file().read_text()}
    line = [str(processes.BIN / "ray"), "job", "submit", "--address", network.URL, "--", "python", *entrypoint]
    path = folder / f"{time.monotonic_ns()}.log"
    counts, most = [workers(pool)], 0
    with path.open("w") as log:
        job = subprocess.Popen(line, env={**os.environ, **own}, stdout=log, stderr=log)
        deadline = time.monotonic() + 900
        while job.poll() is None and time.monotonic() < deadline:
            now, most = workers(pool), max(most, actors(actor))
            counts += [now] if now != counts[-1] else []
            time.sleep(1)
        job.kill()
    said = path.read_text()
    assert (job.returncode != 0) == bool(fails_with), said[-4000:]
    assert fails_with in said
    assert "the cluster has to grow" in said
    print(counts, most, actor)
    return counts, most


def until_none_is_left(seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while workers():
        assert time.monotonic() < deadline
        time.sleep(1)


def test_embedding_grows_a_cluster_of_no_workers_to_its_most_and_lets_them_go(folder, tmp_path):
    write_pairs(str(tmp_path), 3000, shard_rows=100)
    store = str(folder / "store")
    embed = ["jobs/embed.py", "--data", str(tmp_path), "--batch_size", "50", "--num_encoders", str(MOST)]
    counts, encoders = follow(folder, "ShardEmbedder", *embed, "--output", store)
    assert (counts[0], max(counts), encoders) == (0, MOST, MOST)
    assert EmbeddingStore.open(store).num_rows == 3000
    until_none_is_left()


def test_encoders_on_gpus_bring_machines_of_the_pool_that_has_them_and_no_others(folder, tmp_path):
    """Each encoder asks for a GPU, finds none on its machine, and says so: what happens where a driver is missing."""
    write_pairs(str(tmp_path), 300, shard_rows=100)
    embed = ["jobs/embed.py", "--data", str(tmp_path), "--output", str(folder / "gpu"), "--num_encoders", str(MOST)]
    said = "device 'cuda' is not here: this machine has 0 CUDA devices"
    counts, _ = follow(folder, "ShardEmbedder", *embed, "--use_gpu", "true", pool="gpu", fails_with=said)
    assert (counts[0], max(counts)) == (0, MOST)
    assert workers("decode") == 0
    until_none_is_left()


def test_a_held_share_of_a_gallery_brings_the_node_that_has_its_memory(folder, tmp_path):
    """Three shares of 75 MB for nodes that give out 110 MB."""
    encoder = load_encoder("scenes-tiny", device="cpu")
    store, per_part, num_parts = str(folder / "gallery"), 49_000, 9
    spec = store_spec(encoder.details, dtype="float16", captions="none", input_digest="random")
    writer = EmbeddingWriter(store, spec)
    for index in range(num_parts):
        vectors = np.random.default_rng(index).standard_normal((per_part, encoder.dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        writer.write_part(index, [f"{index}-{row}" for row in range(per_part)], vectors)
    writer.commit(rows_in=num_parts * per_part, check_unique_ids=False)
    queries = tmp_path / "queries.jsonl"
    rows = [{"query_id": f"q{n}", "reference": f"{n % 9}-{n}", "relative_caption": "make it red"} for n in range(90)]
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    retrieve = ["jobs/batch_retrieve.py", "--benchmark", "custom", "--queries", str(queries), "--gallery", store, "--name", "held",
                "--num_shards", str(MOST), "--queries_per_part", "30", "--alpha", "0.8"]  # fmt: skip
    counts, shares = follow(folder, "Shard", *retrieve)
    assert (counts[0], max(counts), shares) == (0, MOST, MOST)
    result = files.read_json("s3://cir/runs/batch_retrieve/held/result.json")
    assert (result["num_answered"], result["num_parts"]) == (90, 3)
    until_none_is_left()


def test_elastic_training_takes_the_workers_that_come(folder, tmp_path):
    write_pairs(str(tmp_path), 3000, shard_rows=100)
    train = ["jobs/tat_train.py", "--data", str(tmp_path), "--global_batch_size", "100", "--num_workers", f"[1,{MOST}]"]
    counts, trainers = follow(folder, "RayTrainWorker", *train, "--cpus_per_worker", "1", "--name", "elastic")
    assert (counts[0], max(counts)) == (0, MOST)
    assert trainers > 1
    until_none_is_left()
