"""How a job runs: exit codes, the connection to Ray, and the check that the cluster can hold it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata

import ray

from cir_core.schema import CirError
from jobs.config import repository_root

# Ray Data starts footer-reader actors for Parquet reads otherwise: seconds on every execution of a small cluster.
_ENVIRONMENT = {"RAY_DATA_USE_DATASOURCE_V2": "0", "RAY_TRAIN_V2_ENABLED": "1"}


def say(message: str) -> None:
    """Print a line a person reads while the job runs, at once also through a pipe."""
    print(message, flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a job's main and leave with its exit code: 0 done, 2 bad input or configuration, 1 failed at run time."""
    try:
        main()
    except CirError as error:
        message = str(error.cause) if hasattr(error, "cause") else str(error)  # a RayTaskError wraps the cause
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues where this one stopped", file=sys.stderr, flush=True)
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        print(
            f"error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} (traceback above); "
            "the same command continues where this one stopped",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)


def code_version() -> str:
    """Return the package version, with the commit where the code lies in a git checkout."""
    version = metadata.version("slerp-tat")
    command = ["git", "-C", str(repository_root()), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{commit}"


def connect() -> None:
    """Connect to the cluster this job was submitted to, or start a local one when run as plain `python jobs/...`.

    Raises:
        CirError: RAY_ADDRESS names a cluster that does not answer.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if "RAY_ADDRESS" not in os.environ else "")
    if not os.environ["RAY_AUTH_MODE"]:
        del os.environ["RAY_AUTH_MODE"]  # a cluster's own choice stands
    try:
        ray.init(
            logging_level=logging.WARNING,
            log_to_driver=True,
            runtime_env={"env_vars": dict(_ENVIRONMENT)},
            ignore_reinit_error=True,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise CirError(
            f"no Ray cluster at {os.environ.get('RAY_ADDRESS', 'auto')}: {str(error).splitlines()[0]}; "
            "start one with `make up`, or check RAY_ADDRESS"
        ) from None
    ray.data.DataContext.get_current().enable_progress_bars = False


def check_resources(needed: dict[str, float], *, wait_s: float = 20.0) -> None:
    """Check that the cluster can hold a gang of `needed` resources, now or after its other jobs.

    Args:
        needed: e.g. {"CPU": 2, "GPU": 1}, summed over the job's workers.
        wait_s: how long resources in use by others are waited for before the message.

    Raises:
        CirError: the cluster has less in total, or others hold it.
    """
    total = ray.cluster_resources()
    short = {key: (amount, total.get(key, 0.0)) for key, amount in needed.items() if total.get(key, 0.0) < amount}
    if short:
        listed = ", ".join(f"{key}: needs {need:g}, cluster has {has:g}" for key, (need, has) in short.items())
        raise CirError(f"the cluster is too small ({listed}); use fewer workers or add nodes")
    deadline = time.monotonic() + wait_s
    while True:
        free = ray.available_resources()
        if all(free.get(key, 0.0) >= amount for key, amount in needed.items()):
            return
        if time.monotonic() > deadline:
            listed = ", ".join(f"{key}: needs {need:g}, free {free.get(key, 0.0):g}" for key, need in needed.items())
            raise CirError(
                f"no free resources ({listed}) after {wait_s:g} s: other jobs hold them. `ray job list` shows them; "
                "wait, stop one, or use fewer workers"
            )
        time.sleep(1.0)
