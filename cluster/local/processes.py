"""Servers of this machine: start them on loopback, remember them, stop exactly what was started.

What runs is in <run folder>/cluster.json: pid and start time of each server, and a mark that everything it starts
inherits. The run folder is CIR_RUN_DIR, or .run; `cluster.py` holds the commands.
"""

from __future__ import annotations

import contextlib
import fcntl
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
PORTS = {
    "gcs": 26379,
    "dashboard": 8265,
    "mlflow": 5000,
    "s3": 8333,
}  # Ray asks for fixed ports above its workers' default range
START_TIMEOUT_S = 180.0
MARK = "CIR_STARTED_BY"  # in the environment of everything that a server starts, whatever session it moves to

Record = dict[str, Any]
_CHILDREN: list[subprocess.Popen[bytes]] = []  # of this process: a test or a campaign that goes on reaps what it ends


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


def port_is_free(port: int, host: str = HOST) -> bool:
    """Whether a server could listen on this port of an address of this machine now."""
    return _bound(port, host) is not None


def _bound(port: int, host: str = HOST) -> int | None:
    """Bind a socket for a moment and return its port, None if it is taken; 0 has the system pick one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def free_port(name: str) -> int:
    """Return the default port of a server, or the next free one, saying so, when another process has it.

    One that the system picks (0) comes last: Ray takes ports from the same range while the other server is starting.
    """
    first = default_port(name) if name in PORTS else 0
    for port in (*range(first, min(first + 50, 65536)), 0) if first else (0,):
        found = _bound(port)
        if found is not None:
            return found
        if port == first:
            print(f"port {port} ({name}) is in use by another program; taking another one", flush=True)
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
    state: dict[str, Record],
    name: str,
    command: list[str],
    extra_env: Mapping[str, str | None],
    about: Record,
    *,
    ready: str,
) -> None:
    """Start a server in a session of its own and record it in `state`.

    Args:
        state: the record of all servers.
        name: of this one.
        command: its command line; it may hold no secret, other users can read it.
        extra_env: variables beside those of this process; None takes one away.
        about: goes into the record. "kill": stop it with SIGKILL at once. "litter": files to remove once it has ended.
        ready: the URL that will answer when it is up.
    """
    log = run_dir() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    own = {**extra_env, MARK: mark, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    env = {key: value for key, value in {**os.environ, **own}.items() if value is not None}
    state[name] = {"pid": 0, "started": 0.0, "mark": mark, "ready": ready, **about}
    save_state(state)  # before it starts: a killed `up` leaves nothing that `down` cannot find by its mark
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    _CHILDREN.append(process)
    started = psutil.Process(process.pid).create_time()
    state[name] = {"pid": process.pid, "started": started, "mark": mark, "ready": ready, **about}
    save_state(state)


def finish_start(state: dict[str, Record], name: str, check: Callable[[], bool] | None = None) -> None:
    """Wait until a started server answers; stop and forget it if it does not. check: as in `wait_until_ready`."""
    try:
        wait_until_ready(state[name], run_dir() / "logs" / f"{name}.log", check=check)
    except BaseException:
        stop(name, state.pop(name))
        save_state(state)
        raise


def wait_until_ready(
    record: Mapping[str, Any],
    log: Path,
    timeout_s: float = START_TIMEOUT_S,
    *,
    check: Callable[[], bool] | None = None,
) -> None:
    """Wait until a server answers; StartError with the end of its log if it dies or takes too long.

    check: whether it is ready, where an answer from record["ready"] alone does not say so.
    """
    deadline = time.monotonic() + timeout_s
    while not (check() if check else answers(record["ready"])):
        if alive(record) is None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StartError(f"no answer from {record['ready']}, see {log}:\n{tail}")
        time.sleep(0.2)


def still_good(state: Mapping[str, Record], name: str) -> bool:
    """Whether a recorded server lives and answers; one that is starting gets half a minute."""
    record = state[name]
    try:
        wait_until_ready(record, run_dir() / "logs" / f"{name}.log", timeout_s=30)
    except StartError:
        return False
    return alive(record) is not None


def stop(name: str, record: Mapping[str, Any]) -> None:
    """Stop one recorded server with everything it started: its leader first, then the rest, SIGKILL at the end."""
    leader, known = alive(record), set(family(record))

    def left() -> list[psutil.Process]:
        """What was found before and lives, whose marked kin may be gone by now, and what was started meanwhile."""
        known.update(family(record))
        return [process for process in known if running(process)]

    if leader:
        signal = psutil.Process.kill if record.get("kill") else psutil.Process.terminate
        end([leader], signal, timeout_s=20)
    end(left(), psutil.Process.terminate, timeout_s=5)
    for _ in range(5):
        if not end(left(), psutil.Process.kill, timeout_s=10):
            break
    for path in record.get("litter", ()):
        Path(path).unlink(missing_ok=True)
    print(f"stopped {name}" if known else f"{name} was not running", flush=True)


def kill_now(record: Mapping[str, Any]) -> int:
    """End a server and all it started with SIGKILL, as a crash would; it stays recorded. Returns how many there were."""
    return end(family(record), psutil.Process.kill, timeout_s=10)


def end(processes: list[psutil.Process], signal: Callable[[psutil.Process], None], *, timeout_s: float) -> int:
    """Signal processes and wait until they have ended, reaped or not; return how many there were."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            signal(process)
    deadline = time.monotonic() + timeout_s
    while any(map(running, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    reap()
    return len(processes)


def reap() -> None:
    """Take note of servers of this process that have ended, whoever stopped them."""
    _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]


def running(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that nobody has reaped yet has, once its last thread let go of its ports."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return bool(process.num_threads() > 1)
        return bool(process.is_running())
    except psutil.NoSuchProcess:
        return False
