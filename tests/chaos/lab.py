"""Everything a campaign needs on one machine: S3 server, fault proxy, MLflow server, a Ray head and a second Ray node."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fault_proxy import FaultProxy, start_proxy
from processes import (
    ROOT,
    Record,
    StartError,
    alive,
    finish_start,
    kill_now,
    load_state,
    locked,
    save_state,
    stop,
)
from ray_nodes import start_head, start_node
from s3_server import S3Server, start_s3, without_others

from cluster import down, start_mlflow

NODE_CPUS = 1


class Lab:
    """The servers, the environment of the jobs, and the jobs as processes. All state is in CIR_RUN_DIR."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.state: dict[str, Record] = load_state()
        self.s3: S3Server
        self.proxy: FaultProxy
        self.node = ""  # name of the second node's record

    def start(self) -> None:
        """Start all servers; `stop` stops them, also after a failure here."""
        # It comes back on its port after an outage, so not the one that others take meanwhile.
        os.environ.setdefault("CIR_S3_PORT", "18333")
        with locked():
            self.s3 = start_s3(self.state)
            self.proxy = start_proxy(self.state, self.s3.endpoint)
            os.environ.update(self.s3.environment())  # of this process, which reads results without the proxy
            self.start_mlflow()
            # the port that a restarted server takes again
            os.environ["CIR_MLFLOW_PORT"] = self.tracking_uri.rpartition(":")[2]
            self._start_cluster()

    def _start_cluster(self) -> None:
        """Start the head and the second node, up to three times: on a loaded machine a head may answer and then give up."""
        for attempt in range(3):
            start_head(self.state, self.variables(), {"tracking_uri": self.tracking_uri, "s3": self.s3.endpoint})
            try:
                self.start_node()
                return
            except StartError:
                if attempt == 2:
                    raise
                stop("ray", self.state.pop("ray"))
                save_state(self.state)

    def stop(self) -> None:
        """Stop all servers; Ray's have nothing to save."""
        for name in {"ray", self.node} & self.state.keys():
            kill_now(self.state[name])
        down()

    @property
    def tracking_uri(self) -> str:
        """URL of the MLflow server."""
        return str(self.state["mlflow"]["url"])

    def variables(self) -> dict[str, str | None]:
        """Return what Ray's processes and the jobs have in their environment: S3 through the proxy."""
        return {
            **without_others(),
            **self.s3.environment(),
            "AWS_ENDPOINT_URL": self.proxy.url,
            "MLFLOW_TRACKING_URI": self.tracking_uri,
        }

    def start_node(self) -> None:
        """Start the second node, again while the head lives: a loaded machine can be too slow for Ray."""
        for attempt in range(3):
            try:
                self.node = start_node(self.state, num_cpus=NODE_CPUS, extra_env=self.variables())
                return
            except StartError:
                if attempt == 2 or alive(self.state["ray"]) is None:
                    raise

    def restart_node(self) -> None:
        """Clear away what a killed raylet left behind and start another node."""
        stop(self.node, self.state.pop(self.node))
        save_state(self.state)
        self.start_node()

    def start_s3(self) -> None:
        """Start the S3 server again after a kill: the same port, keys and objects."""
        start_s3(self.state)

    def start_mlflow(self) -> None:
        """Start the MLflow server again after a kill: the same port and runs."""
        start_mlflow(self.state, self.s3)
        finish_start(self.state, "mlflow")

    def uri(self, *parts: str) -> str:
        """Return the URI of something in the bucket."""
        return "/".join([self.s3.bucket_uri, *parts])

    def launch(self, job: str, settings: Mapping[str, Any], log: Path) -> subprocess.Popen[bytes]:
        """Start a job as people do, `python jobs/<job>.py --name value ...`, with its output added to `log`."""
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py")]
        command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        own = {"RAY_ADDRESS": self.state["ray"]["address"], "RAY_AUTH_MODE": "disabled", **self.variables()}
        own |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONFAULTHANDLER": "1"}
        env = {name: value for name, value in {**os.environ, **own}.items() if value is not None}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                command, env=env, cwd=self.home, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
