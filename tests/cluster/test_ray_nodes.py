"""A second Ray node on this machine, and servers that start again to use the S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import mlflow
import processes
import psutil
import pytest
import requests
from ray_nodes import alive_nodes, start_node
from s3_server import load_server

import cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Runs a task where the resource "second" is, and prints which node that was and a variable of its worker.
TASK = """
import os, ray
ray.init(logging_level="ERROR", log_to_driver=False)
run = ray.remote(num_cpus=0, resources={"second": 1})(
    lambda: [ray.get_runtime_context().get_node_labels().get("zone"), os.environ.get("MLFLOW_TRACKING_URI")])
print(*ray.get(run.remote()))
"""


def run_task(head: dict[str, str]) -> list[str]:
    own = {"RAY_ADDRESS": head["address"], "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    line = [sys.executable, "-c", TASK]
    done = subprocess.run(line, env={**os.environ, **own}, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split()


@pytest.mark.long
def test_a_node_joins_works_dies_and_is_replaced(home):
    alone = home.command("node")
    assert alone.returncode == 1
    assert "`make up` starts one" in alone.stderr
    assert home.command("up").returncode == 0
    head = home.state()["ray"]
    joined = home.command("node", "--resources", '{"second": 1}', "--labels", "zone=b")
    assert joined.returncode == 0, joined.stderr
    first = home.state()["node-1"]
    assert alive_nodes(head) == {first["label"]}
    assert home.listening() == {"127.0.0.1"}
    assert run_task(head) == ["b", head["tracking_uri"]]

    raylets = [process for process in processes.family(first) if process.name() == "raylet"]
    assert len(raylets) == 1
    assert processes.kill_now(first) >= 3
    assert processes.family(first) == []
    deadline = time.monotonic() + 120
    while alive_nodes(head):
        assert time.monotonic() < deadline
        time.sleep(0.5)

    state = processes.load_state()
    assert start_node(state, resources={"second": 1}, labels={"zone": "c"}) == "node-2"
    assert run_task(head)[0] == "c"
    again = home.command("up")  # the head is as it was, what died is forgotten, what lives goes on
    assert again.returncode == 0, again.stderr
    assert "starting" not in again.stdout
    assert sorted(home.state()) == ["mlflow", "node-2", "ray"]
    assert home.state()["ray"] == head

    second = home.state()["node-2"]
    psutil.Process(head["pid"]).kill()
    home.command("up")
    assert sorted(home.state()) == ["mlflow", "ray"]
    assert processes.family(second) == []
    assert "stopped ray" in home.command("down").stdout
    assert home.processes() == []


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_servers_that_run_without_s3_start_again_with_it_but_not_under_a_running_job(home, capsys, tmp_path):
    plain = cluster.up()
    jobs = f"{plain['ray']['url']}/api/jobs/"
    requests.post(jobs, json={"entrypoint": "sleep 600", "submission_id": "long"}, timeout=60).raise_for_status()
    with pytest.raises(processes.StartError, match="but jobs are running: long"):
        cluster.up(s3=True)
    assert home.state()["ray"] == plain["ray"]
    requests.post(f"{jobs}long/stop", timeout=60).raise_for_status()
    while cluster.running_jobs(plain["ray"]["url"]):
        time.sleep(0.5)

    state = cluster.up(s3=True)
    assert f"ray was started without {state['s3']['url']}, starting it again" in capsys.readouterr().out
    assert state["ray"]["pid"] != plain["ray"]["pid"]
    server = load_server()
    raylet = next(process for process in processes.family(state["ray"]) if process.name() == "raylet")
    assert server.environment().items() <= raylet.environ().items()  # which every worker inherits

    client = mlflow.MlflowClient(state["mlflow"]["url"])
    run = client.create_run(client.create_experiment("in-s3"))
    (tmp_path / "note.txt").write_text("in the bucket")
    client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
    (found,) = server.client().list_objects_v2(Bucket="cir", Prefix="mlflow/")["Contents"]
    assert found["Key"].endswith(f"{run.info.run_id}/artifacts/note.txt")

    psutil.Process(state["s3"]["pid"]).kill()
    later = cluster.up()  # it comes back where it was, so that nothing else has to start again
    assert later["s3"]["pid"] != state["s3"]["pid"]
    assert (later["ray"], later["mlflow"]) == (state["ray"], state["mlflow"])
    assert "note.txt" in [item.path for item in client.list_artifacts(run.info.run_id)]
