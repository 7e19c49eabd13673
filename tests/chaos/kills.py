"""Finds living processes of a job and of its servers, and kills them."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from lab import Lab
from processes import Record, end, family, kill_now, running

# Ray puts a title in place of a worker's command line: ray::<task>, or ray::<actor>.<method> while one runs.
TITLES = {
    "decode_worker": re.compile(r"^ray::\S*decode", re.IGNORECASE),
    "encode_actor": re.compile(r"^ray::\S*Embedder"),
    "train_worker": re.compile(r"^ray::\S*RayTrainWorker"),
}
KINDS = (*TITLES, "raylet", "driver", "s3_outage", "mlflow_outage")
S3_OUTAGE_S = 20.0
MLFLOW_OUTAGE_S = 10.0
_PATIENCE_S = 90.0  # a worker that was killed is back before that


@dataclass(frozen=True)
class Kill:
    """A kill that hit. at: Unix time of it; target: what it hit; down_s: how long it was away, for an outage."""

    at: float
    kind: str
    target: str
    down_s: float = 0.0


def raylets(lab: Lab) -> dict[str, psutil.Process]:
    """Return the living raylets of the cluster by the name of their record."""
    found: dict[str, psutil.Process] = {}
    for name, record in lab.state.items():
        if name == "ray" or "head" in record:
            found.update((name, one) for one in family(record) if _is_raylet(one))
    return found


def _is_raylet(process: psutil.Process) -> bool:
    try:
        return process.name() == "raylet" and running(process)
    except psutil.NoSuchProcess:
        return False


def workers(nodes: dict[str, psutil.Process], kind: str) -> list[tuple[str, psutil.Process]]:
    """Return the living workers of a kind, each with its title and node."""
    found = []
    for node, raylet in nodes.items():
        try:
            children = raylet.children()
        except psutil.NoSuchProcess:
            continue
        for child in children:
            title = _title(child)
            if TITLES[kind].search(title):
                found.append((f"{title} on {node}", child))
    return found


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip() if running(process) else ""
    except psutil.Error:
        return ""


def kill_worker(lab: Lab, kind: str, choose: Callable[[int], int], wanted: Callable[[], bool]) -> Kill | None:
    """SIGKILL one worker of a kind as soon as there is one; None if `wanted` becomes false before that."""
    nodes = raylets(lab)
    while wanted():
        found = workers(nodes, kind)
        if not found:
            time.sleep(0.01)
            continue
        target, victim = found[choose(len(found))]
        if _end(victim):
            return Kill(time.time(), kind, target)
    return None


def _end(process: psutil.Process) -> bool:
    """SIGKILL a process; returns whether it was alive and has ended by that."""
    if not running(process):
        return False
    end([process], psutil.Process.kill, timeout_s=30)
    return not running(process)


def kill_driver(driver: subprocess.Popen[bytes]) -> Kill | None:
    """SIGKILL the job's own process; None if it has ended before."""
    driver.send_signal(signal.SIGKILL)
    code = driver.wait()
    return Kill(time.time(), "driver", f"pid {driver.pid}") if code == -signal.SIGKILL else None


def kill_raylet(lab: Lab) -> Kill | None:
    """SIGKILL the second node's raylet, clear away the workers that it leaves behind, and let a new node join."""
    raylet = raylets(lab).get(lab.node)
    if raylet is None:
        return None
    busy = [title for title in map(_title, raylet.children()) if title.startswith("ray::") and "IDLE" not in title]
    if not _end(raylet):
        return None
    kill = Kill(time.time(), "raylet", f"{lab.node} with {len(busy)} busy workers: {', '.join(busy)}")
    lab.restart_node()
    return kill


def outage(lab: Lab, name: str, seconds: float, start: Callable[[], object]) -> Kill | None:
    """Kill a server with all it started, wait, start it again; None if it was not running."""
    record: Record = lab.state[name]
    at = time.time()
    if not kill_now(record):
        return None
    time.sleep(seconds)
    start()
    return Kill(at, f"{name}_outage", f"pid {record['pid']}", round(time.time() - at, 1))


def do(kind: str, lab: Lab, driver: subprocess.Popen[bytes], choose: Callable[[int], int]) -> Kill | None:
    """Do one kill of a kind of KINDS; None if nothing of the kind could be hit."""
    if kind == "driver":
        return kill_driver(driver)
    if kind == "raylet":
        return kill_raylet(lab)
    if kind == "s3_outage":
        return outage(lab, "s3", S3_OUTAGE_S, lab.start_s3)
    if kind == "mlflow_outage":
        return outage(lab, "mlflow", MLFLOW_OUTAGE_S, lab.start_mlflow)
    deadline = time.monotonic() + _PATIENCE_S
    return kill_worker(lab, kind, choose, lambda: driver.poll() is None and time.monotonic() < deadline)
