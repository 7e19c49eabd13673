"""A local Ray head and MLflow server on loopback: `make up`, `make down`, `make demo`.

    python cluster/local/cluster.py up      # start what is not running, print the addresses
    python cluster/local/cluster.py down    # stop exactly what `up` started
    python cluster/local/cluster.py demo    # up, then both jobs through `ray job submit`

What was started is in .run/cluster.json. Nothing listens on any address but 127.0.0.1. Ray's token authentication is
off here: whoever has an account on this machine can reach the Jobs API, like a notebook server without a password.

Environment: CIR_RUN_DIR is the folder for state, logs and MLflow's data (.run); CIR_DASHBOARD_PORT, CIR_GCS_PORT and
CIR_MLFLOW_PORT are the ports to try first (8265, 26379, 5000).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
PORTS = {"gcs": 26379, "dashboard": 8265, "mlflow": 5000}  # Ray asks for fixed ports above its workers' default range
START_TIMEOUT_S = 180.0
MARK = "CIR_STARTED_BY"  # in the environment of everything that a server starts, whatever session it moves to

Record = dict[str, Any]


class StartError(RuntimeError):
    """A server did not come up; the message says where its log is."""


def run_dir() -> Path:
    """Return the folder for state, logs and MLflow's data."""
    return Path(os.environ.get("CIR_RUN_DIR") or ROOT / ".run").absolute()


def default_port(name: str) -> int:
    """Return the port that a server tries first."""
    variable = f"CIR_{name.upper()}_PORT"
    text = os.environ.get(variable) or str(PORTS[name])
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise StartError(f"{variable}={text!r} is not a port: expected a number from 1024 to 65535")
    return int(text)


def free_port(name: str) -> int:
    """Return the default port of a server, or the next free one, saying so, when another process has it.

    One that the system picks (0) comes last: Ray takes ports from the same range while the other server is starting.
    """
    first = default_port(name) if name in PORTS else 0
    for port in (*range(first, min(first + 50, 65536)), 0) if first else (0,):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                if port == first:
                    print(f"port {port} ({name}) is in use by another program; taking another one", flush=True)
                continue
            return int(probe.getsockname()[1])
    raise StartError(f"no free port on {HOST} for {name}")


def answers(url: str) -> bool:
    """Whether an HTTP server answers at `url`."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310 - our own http:// addresses
            return bool(reply.status == 200)
    except (OSError, ValueError, http.client.HTTPException):  # the last: something that speaks another protocol
        return False


def alive(record: Mapping[str, Any]) -> psutil.Process | None:
    """Return the recorded process if it still runs; a reused pid is told apart by its start time."""
    try:
        process = psutil.Process(record["pid"])
        if abs(process.create_time() - record["started"]) < 1 and running(process):
            return process
    except psutil.NoSuchProcess:
        pass
    return None


def family(record: Mapping[str, Any]) -> list[psutil.Process]:
    """Return every living process of a server, also those that outlived it or moved to a session of their own.

    Ray overwrites the environment of some of its processes, so the mark alone does not find all: whatever shares the
    session that `start` opened with a marked process is ours as well. A session's number is not reused while any of
    it lives, but is afterwards: without a living leader or a marked process in it, it is someone else's.
    """
    leader = alive(record)
    found = {process.pid: process for process in ([leader, *leader.children(recursive=True)] if leader else [])}
    in_session: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == record["pid"]:
                in_session.append(process)
            if record.get("mark") and process.environ().get(MARK) == record["mark"]:
                found[process.pid] = process
    if any(process.pid in found for process in in_session):
        found |= {process.pid: process for process in in_session}
    return [process for process in found.values() if process.pid != os.getpid() and running(process)]


def load_state() -> dict[str, Record]:
    """Return the servers that `up` recorded."""
    path = run_dir() / "cluster.json"
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError:
        raise StartError(f"{path} is damaged; stop what still runs by hand, then remove the file") from None
    return dict(found)


def save_state(state: Mapping[str, Any]) -> None:
    """Record the servers, atomically."""
    path = run_dir() / "cluster.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=2))
    temporary.replace(path)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Let one `up` or `down` work at a time; a second one waits."""
    run_dir().mkdir(parents=True, exist_ok=True)
    with (run_dir() / "cluster.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another `up` or `down` is at work, waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def start(
    state: dict[str, Record], name: str, command: list[str], extra_env: Mapping[str, str], about: Record, *, ready: str
) -> None:
    """Start a server in a session of its own and record it with `about` in `state`; `ready` will answer when it is up."""
    log = run_dir() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    env = {**os.environ, **extra_env, MARK: mark, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    state[name] = {"pid": 0, "started": 0.0, "mark": mark, "ready": ready, **about}
    save_state(state)  # before it starts: a killed `up` leaves nothing that `down` cannot find by its mark
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    started = psutil.Process(process.pid).create_time()
    state[name] = {"pid": process.pid, "started": started, "mark": mark, "ready": ready, **about}
    save_state(state)


def finish_start(state: dict[str, Record], name: str) -> None:
    """Wait until a started server answers; stop and forget it if it does not."""
    try:
        wait_until_ready(state[name], run_dir() / "logs" / f"{name}.log")
    except BaseException:
        stop(name, state.pop(name))
        save_state(state)
        raise


def wait_until_ready(record: Mapping[str, Any], log: Path, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until a server answers; StartError with the end of its log if it dies or takes too long."""
    deadline = time.monotonic() + timeout_s
    while not answers(record["ready"]):
        if alive(record) is None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StartError(f"no answer from {record['ready']}, see {log}:\n{tail}")
        time.sleep(0.5)


def stop(name: str, record: Mapping[str, Any]) -> None:
    """Stop one recorded server with everything it started: its leader first, then the rest, SIGKILL at the end."""
    leader, known = alive(record), set(family(record))

    def left() -> list[psutil.Process]:
        """What was found before and lives, whose marked kin may be gone by now, and what was started meanwhile."""
        known.update(family(record))
        return [process for process in known if running(process)]

    if leader:
        end([leader], psutil.Process.terminate, timeout_s=20)
    end(left(), psutil.Process.terminate, timeout_s=5)
    for _ in range(5):
        if not end(left(), psutil.Process.kill, timeout_s=10):
            break
    print(f"stopped {name}" if known else f"{name} was not running", flush=True)


def end(processes: list[psutil.Process], signal: Callable[[psutil.Process], None], *, timeout_s: float) -> int:
    """Signal processes and wait until they have ended, reaped or not; return how many there were."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            signal(process)
    deadline = time.monotonic() + timeout_s
    while any(map(running, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(processes)


def running(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that nobody has reaped yet has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start_mlflow(state: dict[str, Record]) -> None:
    """Start the tracking server: SQLite and artifacts below the run folder, one worker."""
    port = free_port("mlflow")
    home = run_dir() / "mlflow"
    home.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port),
        "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}",
        "--artifacts-destination", str(home / "artifacts"),
        "--workers", "1", "--gunicorn-opts", "--timeout 120",
    ]  # fmt: skip
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    url = f"http://{HOST}:{port}"
    start(state, "mlflow", command, env, {"url": url}, ready=f"{url}/health")


def start_ray(state: dict[str, Record], tracking_uri: str) -> None:
    """Start a Ray head with dashboard and Jobs API; on a loaded machine that can fail, so up to three times."""
    for attempt in range(3):
        gcs, dashboard = free_port("gcs"), free_port("dashboard")
        command = [
            str(BIN / "ray"), "start", "--head", "--block", f"--node-ip-address={HOST}", f"--port={gcs}",
            f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}", "--include-dashboard=true",
            # Both are fixed otherwise, and a second head on the machine fails or submits its jobs to the first.
            f"--ray-client-server-port={free_port('ray client')}", "--dashboard-agent-listen-port=0",
            "--object-store-memory=1000000000", "--disable-usage-stats",
        ]  # fmt: skip
        # A folder of its own, short because sockets live in it. In Ray's default folder the head would become the
        # machine's current cluster, which a bare `ray job submit` looks up by an address that nothing listens on here.
        folder = hashlib.sha256(str(run_dir()).encode()).hexdigest()[:8]
        parent = os.environ.get("RAY_TMPDIR", "/tmp")  # noqa: S108 - Ray's own default; tempfile's may be too long
        command.append(f"--temp-dir={parent}/ray-{folder}")
        env = {
            "RAY_AUTH_MODE": "disabled",
            "RAY_ADDRESS": "",
            # Without this, Ray on Linux replaces 127.0.0.1 by the machine's address and listens on all of them.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "MLFLOW_TRACKING_URI": tracking_uri,
            "RAY_DATA_USE_DATASOURCE_V2": "0",
            "RAY_TRAIN_V2_ENABLED": "1",
        }
        url = f"http://{HOST}:{dashboard}"
        about = {"url": url, "address": f"{HOST}:{gcs}", "tracking_uri": tracking_uri}
        try:
            start(state, "ray", command, env, about, ready=f"{url}/api/version")
            finish_start(state, "ray")
        except StartError:
            if attempt == 2:
                raise
            print("Ray did not start, trying again", flush=True)
        else:
            return


def up() -> dict[str, Record]:
    """Start what is not running or does not answer, and return the record of both servers."""
    with locked():
        state = load_state()
        for name in list(state):
            if not _still_good(state, name):
                stop(name, state.pop(name))  # also what a killed server left behind
                save_state(state)
        new_mlflow = "mlflow" not in state
        if new_mlflow:
            print("starting the MLflow server", flush=True)
            start_mlflow(state)
        tracking_uri = state["mlflow"]["url"]
        if "ray" in state and state["ray"]["tracking_uri"] != tracking_uri:
            stop("ray", state.pop("ray"))
        if "ray" not in state:
            print("starting the Ray head", flush=True)
            start_ray(state, tracking_uri)
        if new_mlflow:
            finish_start(state, "mlflow")  # it started beside Ray
        return state


def _still_good(state: Mapping[str, Record], name: str) -> bool:
    record = state[name]
    try:
        wait_until_ready(record, run_dir() / "logs" / f"{name}.log", timeout_s=30)
    except StartError:
        return False
    return alive(record) is not None


def show(state: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the addresses, and what to export where a default port was taken."""
    print(f"Ray dashboard and Jobs API  {state['ray']['url']}\nMLflow                      {state['mlflow']['url']}")
    if not state["ray"]["url"].endswith(f":{PORTS['dashboard']}"):
        print(f"for `ray job submit`:  export RAY_API_SERVER_ADDRESS={state['ray']['url']}")
    print("stop both with `make down`", flush=True)


def down() -> None:
    """Stop what `up` started."""
    with locked():
        state = load_state()
        if not state:
            print("nothing to stop")
        for name in list(state):
            stop(name, state.pop(name))
            save_state(state)
        (run_dir() / "cluster.json").unlink(missing_ok=True)


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
    except KeyboardInterrupt:
        print("stopped; `make up` and `make down` know what was started", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
