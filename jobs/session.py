"""How a job runs: exit codes, the connection to Ray, and the check that the cluster can hold it."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import ray
from ray._common.utils import get_ray_address_file
from ray._private import ray_constants

from cir_core.files import redact
from cir_core.schema import CirError
from jobs.config import repository_root

if TYPE_CHECKING:
    from ray.data import Dataset

# For this process and every worker. A value that the user has set stands.
_ENVIRONMENT = {
    "RAY_DATA_USE_DATASOURCE_V2": "0",  # it starts footer-reader actors: seconds per execution on a small cluster
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # Ray Train would show each worker's line twice
    "RAY_DATA_LOG_LEVEL": "WARNING",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # ours are raised by ray.get; a task's second result would tell them again
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
# The type's name at the start of an error's text: all that Ray Data compares. Those of the subclasses of OSError that
# a network gives.
_NETWORK_ERROR = r"^(OSError|StorageError|BrokenPipeError|Connection\w*Error|TimeoutError)\b"
_FIRST_REST_S, _MOST_REST_S = 0.001, 0.05
_URI = re.compile(r"\w+://\S+")
# KubeRay sets it, to true or false, on heads that have an autoscaler; and that tells nobody how far it goes.
_KUBERAY_AUTOSCALER = "RAY_enable_autoscaler_v2"
_RESUME = "the same command continues where this one stopped"


class Stopped(KeyboardInterrupt):
    """SIGTERM: from `ray job stop`, a spot machine's notice, or Kubernetes."""


def say(message: str) -> None:
    """Print a line a person reads while the job runs, at once also through a pipe; credentials in URIs are left out."""
    print(_URI.sub(lambda found: redact(found[0]), message), flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a job's main and leave with its exit code: 0 done, 2 bad input or configuration, 1 failed or stopped.

    SIGTERM unwinds main like Ctrl-C does, so that `finally` blocks run; a second one ends the process at once.
    """
    _stop_on_sigterm()
    try:
        main()
    except KeyboardInterrupt as stop:
        _leave(1, f"stopped{' by SIGTERM' if isinstance(stop, Stopped) else ''}; {_RESUME}")
    except Exception as error:
        mistake = _mistake(error)
        if mistake is not None:
            _leave(2, f"error: {mistake}")
        traceback.print_exc()
        cause = getattr(error, "cause", None) or error  # a RayTaskError's own text is a traceback
        lines = str(cause).strip().splitlines()
        _leave(1, f"error: {type(cause).__name__}: {lines[0] if lines else ''} (traceback above); {_RESUME}")


def _leave(code: int, message: str) -> NoReturn:
    sys.stdout.flush()
    print(_URI.sub(lambda found: redact(found[0]), message), file=sys.stderr, flush=True)
    sys.exit(code)


def _stop_on_sigterm() -> None:
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Stopped

    signal.signal(signal.SIGTERM, stop)


def _mistake(error: BaseException) -> str | None:
    """Return the message of the CirError that caused `error`, in this process or in a Ray worker; None without one."""
    for cause in causes(error):
        if isinstance(cause, CirError) and not isinstance(cause, ray.exceptions.RayError):
            return str(cause).partition("\nFailed to apply UDF transform")[0]  # Ray Data's note, added to the message
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and everything that it says caused it, each once."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        parts: list[Any] = [getattr(current, "cause", None), current.__cause__]  # RayTaskError, raise ... from
        parts += [
            getattr(current, "controller_failure", None),
            *getattr(current, "worker_failures", {}).values(),
        ]  # Train
        waiting += [part for part in parts if isinstance(part, BaseException)]


def code_version() -> str:
    """Return the package version, with the commit where the code lies in a git checkout of its own."""
    try:
        version = metadata.version("slerp-tat")
    except metadata.PackageNotFoundError:
        version = "0+source"
    root = repository_root()
    if not (root / ".git").exists():
        return version  # installed below someone else's checkout, perhaps: its commit says nothing about this code
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("GIT_")
    }  # set inside git hooks
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{commit.stdout.strip()}"


def connect() -> None:
    """Connect to the cluster this job was submitted to, or start a local one when run as plain `python jobs/...`.

    Raises:
        CirError: RAY_ADDRESS names a cluster that does not answer.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    variables = {key: os.environ[key] for key in _ENVIRONMENT}
    address = _running_cluster()
    if address is None:  # its workers know no address, and would ask whatever other cluster runs on this machine
        port = _free_port()
        os.environ["RAY_GCS_SERVER_PORT"], variables["RAY_ADDRESS"] = port, f"127.0.0.1:{port}"
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster's own choice stands
    if address is None or address.rpartition(":")[0] in ("127.0.0.1", "localhost"):
        # Ray on Linux takes 127.0.0.1 for the machine's other address otherwise, where a head on loopback does not answer.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False  # the variable was read when ray was imported
    try:
        _knock(os.environ.get("RAY_ADDRESS", ""))
        ray.init(
            logging_level=logging.WARNING,
            log_to_driver=True,
            runtime_env={"env_vars": variables},
            ignore_reinit_error=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CirError(
            f"no Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]}; "
            "start one with `make up`, or check RAY_ADDRESS"
        ) from None
    finally:
        os.environ.pop("RAY_GCS_SERVER_PORT", None)
    _stop_on_sigterm()  # ray.init replaces the handler by one that leaves with exit code 15
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # so that a CirError of a worker arrives as one
    memory_detector = context.issue_detectors_config.high_memory_detector_config
    memory_detector.detection_time_interval_s = -1  # it advises a change of this code wherever a model is loaded
    _quiet_ray_data()


def retry_network_errors(dataset: Dataset, *, max_retries: int = 5) -> None:
    """Have Ray Data repeat a task that a network failure ended, with growing pauses: half a minute in all.

    `cir_core.files` has tried each request again before. A repeated task skips the blocks that it had already given out,
    so it must give out the same ones in the same order. Nothing but OSError is repeated.
    """
    dataset.context.raise_original_map_exception = True  # the pattern below sees the error itself
    dataset.context.retried_map_errors = [_NETWORK_ERROR]
    dataset.context.max_map_retries = max_retries


class Paced:
    """Has Ray Data's scheduling loop rest while nothing moves: 1 ms, then twice as long each time, up to 50 ms.

    The loop waits for tasks itself, at most 0.1 s. Where every running task has its next block ready and none may be taken,
    as whenever training is slower than its data, that wait is over at once, again and again: a core that does nothing.
    """

    def __init__(self) -> None:
        self._moved, self._rest_s = -1, 0.0

    def before_execution_starts(self, executor: Any) -> None:
        """Nothing to do."""

    def on_execution_step(self, executor: Any) -> None:
        """Called after each step of the loop."""
        counts = [operator.metrics for operator in executor._topology]
        moved = sum(one.num_tasks_submitted + one.num_task_outputs_generated + one.num_outputs_taken for one in counts)
        self._rest_s = min(2 * self._rest_s or _FIRST_REST_S, _MOST_REST_S) if moved == self._moved else 0.0
        self._moved = moved
        time.sleep(self._rest_s)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing to do."""


def pace(dataset: Dataset) -> None:
    """Keep the loop that schedules a dataset's tasks from taking a core of its own while it has nothing to do."""
    dataset.context.custom_execution_callback_classes.append(Paced)


def _running_cluster() -> str | None:
    """Return the address that ray.init will use: RAY_ADDRESS, else of the cluster that runs here, None without one."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto"):
        found = Path(get_ray_address_file(None))
        address = found.read_text().strip() if found.exists() else ""
    return address if address not in ("", "local") else None


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at host:port: Ray would try for more than a minute."""
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _quiet_ray_data() -> None:
    """Keep Ray Data's notes and tracebacks in its log file; what it raises reaches `run`, which shows it once."""

    def shown(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and not record.exc_info and record.filename != "exceptions.py"

    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns of bars that we switched off
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.filters = [shown]  # RAY_DATA_LOG_LEVEL is read when ray.data is imported, before this


def check_resources(needed: dict[str, float], *, wait_s: float = 20.0) -> None:
    """Check that the cluster can hold a gang of `needed` resources, now or after its other jobs.

    Args:
        needed: e.g. {"CPU": 2, "GPU": 1}, summed over the job's workers.
        wait_s: how long resources in use by others are waited for before the message.

    Raises:
        CirError: the cluster has less in total and its autoscaler may not add enough, or others hold it.
    """
    has = ray.cluster_resources()
    limit = _autoscaler_limit()
    most = {key: max(has.get(key, 0.0), limit.get(key, 0.0)) for key in needed}
    if any(most[key] < amount for key, amount in needed.items()):
        raise CirError(f"the cluster is too small ({_short(needed, most, 'has')}); use fewer workers or add nodes")
    if any(has.get(key, 0.0) < amount for key, amount in needed.items()):
        say(f"the cluster has to grow ({_short(needed, has, 'has')}); its autoscaler adds nodes")
        return
    deadline = time.monotonic() + wait_s
    while True:
        free = ray.available_resources()
        if all(free.get(key, 0.0) >= amount for key, amount in needed.items()):
            return
        if time.monotonic() > deadline:
            raise CirError(
                f"no free resources ({_short(needed, free, 'free')}) after {wait_s:g} s: other jobs hold them. "
                "`ray job list` shows them; wait, stop one, or use fewer workers"
            )
        time.sleep(1.0)


def check_memory(sizes: Sequence[int]) -> None:
    """Check that the cluster's nodes have the memory to hold pieces of these sizes in bytes, each on one node.

    Raises:
        CirError: they have not, and no autoscaler may add nodes.
    """
    largest = max(sizes, default=0)
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [resources.get("memory", 0.0) for resources in alive if resources.get("CPU")]  # a head may have none
    if not largest or sum(memory // largest for memory in nodes) >= len(sizes):
        return
    have = (
        f"the nodes have {', '.join(f'{memory / 1e9:.3g}' for memory in nodes)} GB" if nodes else "there are no workers"
    )
    needs = f"{len(sizes)} x {largest / 1e9:.3g} GB in memory, {have}"
    if _autoscaler_limit().get("CPU", 0.0) <= ray.cluster_resources().get("CPU", 0.0):
        raise CirError(
            f"the gallery's shares do not fit ({needs}); add nodes, or use a --search_memory_gb below a share's size: then "
            "they are read again for every tile"
        )
    say(f"the cluster has to grow ({needs}); its autoscaler adds nodes")


def node_cpus() -> int:
    """Return how many CPUs the jobs of this process's node may use: Ray knows the limit of a container, a process does not."""
    own = len(os.sched_getaffinity(0))
    if not ray.is_initialized():
        return own
    here = ray.get_runtime_context().get_node_id()
    offered = next(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == here)
    return max(1, min(own, int(offered)))


def _short(needed: dict[str, float], there: dict[str, float], word: str) -> str:
    """List what is missing: 'CPU: needs 8, has 2'."""
    missing = [(key, amount, there.get(key, 0.0)) for key, amount in needed.items() if there.get(key, 0.0) < amount]
    return ", ".join(f"{key}: needs {amount:g}, {word} {found:g}" for key, amount, found in missing)


def _autoscaler_limit() -> dict[str, float]:
    """Return what the cluster may grow to; nothing without an autoscaler. Ray Train asks the same way."""
    from ray._private.state import state

    known = state.get_max_resources_from_cluster_config()
    if known is None and _KUBERAY_AUTOSCALER in os.environ:
        return dict.fromkeys(("CPU", "GPU"), math.inf)
    return dict(known or {})
