"""A local Ray head, MLflow server and S3 server on loopback: what `make up`, `make down`, `make demo`, `make s3` run.

    python cluster/local/cluster.py up        # start what is not running, print the addresses
    python cluster/local/cluster.py down      # stop exactly what was started
    python cluster/local/cluster.py demo      # up, then both jobs through `ray job submit`
    python cluster/local/cluster.py s3        # start the S3 server, print what to export
    python cluster/local/cluster.py s3-env    # print only that, for eval "$(...)"
    python cluster/local/cluster.py demo-s3   # the demo with everything in S3: shards, stores, checkpoints, artifacts
    python cluster/local/cluster.py node      # one more Ray node on this machine; --help lists its options

What was started is in .run/cluster.json. Nothing listens on any address but 127.0.0.1. Ray's token authentication is
off here: whoever has an account on this machine can reach the Jobs API, like a notebook server without a password.

Environment: CIR_RUN_DIR is the folder for state, logs and data (.run); CIR_DASHBOARD_PORT, CIR_GCS_PORT,
CIR_MLFLOW_PORT and CIR_S3_PORT are the ports to try first (8265, 26379, 5000, 8333).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from processes import (
    BIN,
    HOST,
    PORTS,
    ROOT,
    Record,
    StartError,
    finish_start,
    free_port,
    load_state,
    locked,
    run_dir,
    save_state,
    start,
    still_good,
    stop,
)
from ray_nodes import start_head, start_node
from s3_server import S3Server, load_server, shell_lines, start_s3, without_others

JOBS = ("jobs/tat_train.py", "jobs/batch_retrieve.py")


def start_mlflow(state: dict[str, Record], server: S3Server | None) -> None:
    """Start the tracking server, one worker: SQLite below the run folder, artifacts there or in S3.

    Runs whose artifacts lie in S3 have a database of their own: MLflow looks for all of them in one place.
    """
    port = free_port("mlflow")
    home = run_dir() / ("mlflow-s3" if server else "mlflow")
    home.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port),
        "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}",
        "--artifacts-destination", f"{server.bucket_uri}/mlflow" if server else str(home / "artifacts"),
        "--workers", "1", "--gunicorn-opts", "--timeout 120",
    ]  # fmt: skip
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", **s3_variables(server)}
    url = f"http://{HOST}:{port}"
    about = {"url": url, "s3": server.endpoint if server else ""}
    start(state, "mlflow", command, env, about, ready=f"{url}/health")


def s3_variables(server: S3Server | None) -> dict[str, str | None]:
    """Return what a process needs in its environment to use the S3 server; nothing without one."""
    return {**without_others(), **server.environment()} if server else {}


def up(*, s3: bool = False) -> dict[str, Record]:
    """Start what is not running or does not answer, and return the record of all servers.

    s3: Ray and MLflow shall use the S3 server. Once they do, they go on so until `down`.
    """
    with locked():
        state = load_state()
        drop_dead(state)
        server = None
        if s3 or any(record.get("s3") for record in state.values()):
            server = s3_server(state)
        stop_without(state, server)
        new_mlflow = "mlflow" not in state
        if new_mlflow:
            print("starting the MLflow server", flush=True)
            start_mlflow(state, server)
        tracking_uri = state["mlflow"]["url"]
        if "ray" in state and state["ray"]["tracking_uri"] != tracking_uri:
            stop("ray", state.pop("ray"))
        if "ray" not in state:
            print("starting the Ray head", flush=True)
            variables = {"MLFLOW_TRACKING_URI": tracking_uri, **s3_variables(server)}
            start_head(state, variables, {"tracking_uri": tracking_uri, "s3": server.endpoint if server else ""})
        if new_mlflow:
            finish_start(state, "mlflow")  # it started beside Ray
        drop_dead(state)  # nodes of a head that is gone
        return state


def drop_dead(state: dict[str, Record]) -> None:
    """Stop and forget servers that do not answer, and nodes without their head."""
    for name in list(state):
        lost_its_head = "head" in state[name] and state[name]["head"] != state.get("ray", {}).get("pid")
        if lost_its_head or not still_good(state, name):
            stop(name, state.pop(name))  # also what a killed server left behind
            save_state(state)


def stop_without(state: dict[str, Record], server: S3Server | None) -> None:
    """Stop the servers that were started without the S3 server that they shall use.

    Raises:
        StartError: jobs are running on the Ray head that would be stopped.
    """
    endpoint = server.endpoint if server else ""
    names = [name for name in ("ray", "mlflow") if name in state and state[name].get("s3", "") != endpoint]
    busy = running_jobs(state["ray"]["url"]) if names and "ray" in state else []
    if busy:
        raise StartError(
            f"{' and '.join(names)} must start again to use {endpoint}, but jobs are running: {', '.join(busy)}; wait for "
            "them, or stop everything with `make down`"
        )
    for name in names:
        print(f"{name} was started without {endpoint}, starting it again", flush=True)
        stop(name, state.pop(name))
        save_state(state)


def running_jobs(dashboard: str) -> list[str]:
    """Return the names of submitted jobs that have not ended."""
    with urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=30) as reply:  # noqa: S310 - our own http:// address
        jobs = json.loads(reply.read())
    return [job["submission_id"] or job["job_id"] for job in jobs if job["status"] in ("PENDING", "RUNNING")]


def s3_server(state: dict[str, Record]) -> S3Server:
    """Return the running S3 server, started if it was not."""
    if "s3" in state:
        return load_server()
    print("starting the S3 server", flush=True)
    return start_s3(state)


def show(state: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the addresses, and what to export where a default port was taken."""
    print(f"Ray dashboard and Jobs API  {state['ray']['url']}\nMLflow                      {state['mlflow']['url']}")
    if "s3" in state:
        print(f"S3 server                   {state['s3']['url']}, bucket {state['s3']['bucket']}")
    if not state["ray"]["url"].endswith(f":{PORTS['dashboard']}"):
        print(f"for `ray job submit`:  export RAY_API_SERVER_ADDRESS={state['ray']['url']}")
    print("stop them with `make down`", flush=True)


def down() -> None:
    """Stop what was started here, the last first: nodes before their head, the S3 server after who writes to it."""
    with locked():
        state = load_state()
        if not state:
            print("nothing to stop")
        for name in reversed(list(state)):
            stop(name, state.pop(name))
            save_state(state)
        (run_dir() / "cluster.json").unlink(missing_ok=True)


def s3() -> None:
    """Start the S3 server alone and print what to export."""
    with locked():
        state = load_state()
        if "s3" in state and not still_good(state, "s3"):
            stop("s3", state.pop("s3"))
        server = s3_server(state)
    print(f"S3 server {server.endpoint}, bucket {server.bucket_uri}; stop it with `make down`. To use it:\n")
    print("\n".join(shell_lines(server)))
    print(f'\nor, in this shell:  eval "$({shlex.join([sys.executable, __file__, "s3-env"])})"', flush=True)


def s3_env() -> None:
    """Print only what a shell evaluates to use the running S3 server."""
    state = load_state()
    if "s3" not in state or not still_good(state, "s3"):
        raise StartError("the S3 server is not running; `make s3` starts it")
    print("\n".join(shell_lines(load_server())))


def node(options: argparse.Namespace) -> None:
    """Start one more node of the running head."""
    with locked():
        state = load_state()
        uses_s3 = bool(state.get("ray", {}).get("s3"))
        variables = {"MLFLOW_TRACKING_URI": state.get("ray", {}).get("tracking_uri")}
        name = start_node(
            state,
            num_cpus=options.num_cpus,
            resources=options.resources,
            labels=dict(item.partition("=")[::2] for item in options.labels.split(",") if item),
            extra_env={**variables, **s3_variables(load_server() if uses_s3 else None)},
        )
    print(f"{name} has joined {state['ray']['address']}; stop it with `make down`", flush=True)


def submit(state: Mapping[str, Mapping[str, Any]], script: str, *arguments: str) -> None:
    """Run `ray job submit -- python <script>` and show its output; leave with its exit code if it fails."""
    job = ["python", script, *arguments]
    print(f"\n$ ray job submit -- {' '.join(job)}", flush=True)
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_API_SERVER_ADDRESS": state["ray"]["url"]}
    env.pop("RAY_ADDRESS", None)
    code = subprocess.run([str(BIN / "ray"), "job", "submit", "--", *job], cwd=ROOT, env=env).returncode
    if code:
        sys.exit(code)


def demo(*, s3: bool = False) -> None:
    """Start the servers, train, retrieve, and say where to look; with s3, all of it in the bucket."""
    started = time.monotonic()
    state = up(s3=s3)
    where = ("--storage_path", f"{load_server().bucket_uri}/runs") if s3 else ()
    for script in JOBS:
        submit(state, script, *where)
    print(f"\ndemo finished in {time.monotonic() - started:.0f} s")
    if s3:
        print(load_server().summary())
    show(state)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; exit code 2 and the usage if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="cluster.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("up", "down", "demo", "s3", "s3-env", "demo-s3"):
        commands.add_parser(name)
    options = commands.add_parser("node", help="one more Ray node on this machine")
    options.add_argument("--num-cpus", type=float, default=1, help="its logical CPUs")
    options.add_argument("--resources", type=json.loads, default={}, help="custom resources, e.g. '{\"second\": 1}'")
    options.add_argument("--labels", default="", help="node labels, e.g. zone=b,disk=ssd")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the command named on the command line."""
    options = parse(sys.argv[1:])
    commands: dict[str, Callable[[], None]] = {
        "up": lambda: show(up()),
        "down": down,
        "demo": demo,
        "s3": s3,
        "s3-env": s3_env,
        "demo-s3": lambda: demo(s3=True),
        "node": lambda: node(options),
    }
    try:
        commands[options.command]()
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; `make up` and `make down` know what was started", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
