"""A local Ray head and MLflow server on loopback: `make up`, `make down`, `make demo`.

    python cluster/local/cluster.py up      # start what is not running, print the addresses
    python cluster/local/cluster.py down    # stop exactly what `up` started, by pid
    python cluster/local/cluster.py demo    # up, then both jobs through `ray job submit`

What was started is in .run/cluster.json. Nothing listens on any address but 127.0.0.1. Ray's token authentication is
off here: whoever has an account on this machine can reach the Jobs API, like a notebook server without a password.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".run" / "cluster.json"
LOGS = ROOT / ".run" / "logs"
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
PORTS = {"gcs": 26379, "dashboard": 8265, "mlflow": 5000}  # Ray asks for fixed ports above its workers' default range
START_TIMEOUT_S = 180.0


class StartError(RuntimeError):
    """A server did not come up; the message says where its log is."""


def free_port(name: str) -> int:
    """Return the default port of a server, or a free one, saying so, when another process has it."""
    for port in (PORTS[name], 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                print(f"port {port} ({name}) is in use by another program; taking another one", flush=True)
                continue
            return int(probe.getsockname()[1])
    raise StartError(f"no free port on {HOST} for {name}")


def answers(url: str) -> bool:
    """Whether an HTTP server answers at `url`."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310 - our own http:// addresses
            return bool(reply.status == 200)
    except (OSError, ValueError):
        return False


def alive(record: Mapping[str, Any]) -> psutil.Process | None:
    """Return the recorded process if it still runs; a reused pid is told apart by its start time."""
    try:
        process = psutil.Process(record["pid"])
        if abs(process.create_time() - record["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    except psutil.NoSuchProcess:
        pass
    return None


def load_state() -> dict[str, dict[str, Any]]:
    """Return the servers that `up` recorded."""
    return json.loads(STATE.read_text()) if STATE.exists() else {}


def save_state(state: Mapping[str, Any]) -> None:
    """Record the servers, atomically."""
    STATE.parent.mkdir(parents=True, exist_ok=True)
    temporary = STATE.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=2))
    temporary.replace(STATE)


def start(name: str, command: list[str], extra_env: Mapping[str, str], *, url: str, ready: str) -> dict[str, Any]:
    """Start a server in a session of its own and wait until `ready` answers."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    env = {**os.environ, **extra_env, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    record = {"pid": process.pid, "started": psutil.Process(process.pid).create_time(), "url": url}
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(ready):
        if process.poll() is not None or time.monotonic() > deadline:
            stop(name, record)
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StartError(f"{name} did not start, see {log}:\n{tail}")
        time.sleep(0.5)
    return record


def stop(name: str, record: Mapping[str, Any]) -> None:
    """Stop one recorded server with everything it started: SIGTERM first, SIGKILL after 20 s."""
    leader = alive(record)
    family = {process.pid: process for process in ([leader, *leader.children(recursive=True)] if leader else [])}
    # What has lost its parent is still in the session that `start` opened.
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == record["pid"] and process.create_time() >= record["started"] - 1:
                family[process.pid] = process
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    for process in family.values():
        if leader is None or process.pid == leader.pid:
            _signal(process, psutil.Process.terminate)
    _, rest = psutil.wait_procs(list(family.values()), timeout=20)
    for process in rest:
        _signal(process, psutil.Process.kill)
    psutil.wait_procs(rest, timeout=10)
    print(f"stopped {name}", flush=True)


def _signal(process: psutil.Process, action: Any) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        action(process)


def start_mlflow() -> dict[str, Any]:
    """Start the tracking server: SQLite and artifacts below .run/mlflow, one worker."""
    port = free_port("mlflow")
    home = ROOT / ".run" / "mlflow"
    home.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port),
        "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}",
        "--artifacts-destination", str(home / "artifacts"),
        "--workers", "1", "--gunicorn-opts", "--timeout 120",
    ]  # fmt: skip
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    url = f"http://{HOST}:{port}"
    return start("mlflow", command, env, url=url, ready=f"{url}/health")


def start_ray(tracking_uri: str) -> dict[str, Any]:
    """Start a Ray head with dashboard and Jobs API; on a loaded machine that can fail, so up to three times."""
    for attempt in range(3):
        gcs, dashboard = free_port("gcs"), free_port("dashboard")
        command = [
            str(BIN / "ray"), "start", "--head", "--block", f"--node-ip-address={HOST}", f"--port={gcs}",
            f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}", "--include-dashboard=true",
            "--object-store-memory=1000000000", "--disable-usage-stats",
        ]  # fmt: skip
        env = {
            "RAY_AUTH_MODE": "disabled",
            "RAY_ADDRESS": "",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray puts the network address where 127.0.0.1 is asked for
            "MLFLOW_TRACKING_URI": tracking_uri,
            "RAY_DATA_USE_DATASOURCE_V2": "0",
            "RAY_TRAIN_V2_ENABLED": "1",
        }
        url = f"http://{HOST}:{dashboard}"
        try:
            record = start("ray", command, env, url=url, ready=f"{url}/api/version")
            return record | {"address": f"{HOST}:{gcs}", "tracking_uri": tracking_uri}
        except StartError:
            if attempt == 2:
                raise
            print("Ray did not start, trying again", flush=True)
    raise AssertionError


def up() -> dict[str, dict[str, Any]]:
    """Start what is not running and return the record of both servers."""
    state = {name: record for name, record in load_state().items() if alive(record)}
    if "mlflow" not in state:
        print("starting the MLflow server", flush=True)
        state["mlflow"] = start_mlflow()
        save_state(state)
    if state.get("ray", {}).get("tracking_uri") != state["mlflow"]["url"]:
        if "ray" in state:
            stop("ray", state.pop("ray"))
        print("starting the Ray head", flush=True)
        state["ray"] = start_ray(state["mlflow"]["url"])
        save_state(state)
    return state


def show(state: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the addresses, and what to export where a default port was taken."""
    print(f"Ray dashboard and Jobs API  {state['ray']['url']}\nMLflow                      {state['mlflow']['url']}")
    if not state["ray"]["url"].endswith(f":{PORTS['dashboard']}"):
        print(f"for `ray job submit`:  export RAY_API_SERVER_ADDRESS={state['ray']['url']}")
    print("stop both with `make down`", flush=True)


def down() -> None:
    """Stop what `up` started."""
    state = load_state()
    if not state:
        print("nothing to stop")
    for name, record in state.items():
        stop(name, record)
    STATE.unlink(missing_ok=True)


def submit(state: Mapping[str, Mapping[str, Any]], script: str) -> None:
    """Run `ray job submit -- python <script>` and show its output; leave with its exit code if it fails."""
    print(f"\n$ ray job submit -- python {script}", flush=True)
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_API_SERVER_ADDRESS": state["ray"]["url"]}
    env.pop("RAY_ADDRESS", None)
    code = subprocess.run([str(BIN / "ray"), "job", "submit", "--", "python", script], cwd=ROOT, env=env).returncode
    if code:
        sys.exit(code)


def demo() -> None:
    """Start the servers, train, retrieve, and say where to look."""
    started = time.monotonic()
    state = up()
    for script in ("jobs/tat_train.py", "jobs/batch_retrieve.py"):
        submit(state, script)
    print(f"\ndemo finished in {time.monotonic() - started:.0f} s")
    show(state)


def main() -> None:
    """Run the command named on the command line."""
    commands = {"up": lambda: show(up()), "down": down, "demo": demo}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print(f"usage: cluster.py {' | '.join(commands)}", file=sys.stderr)
        sys.exit(2)
    try:
        commands[sys.argv[1]]()
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
