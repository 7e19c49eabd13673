"""MLflow; nothing else imports it. Runs with explicit ids, live metrics that never block, results that are not lost.

A tracking server may go away while a job runs. Live metrics wait in memory and are sent later; what must not be lost is
in the run's folder first and is published from there at the end, or by the next run of the same command.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cir_core.schema import CirError
from jobs.session import say

# Short retries inside the client, long ones in our own hands, where they can be told about.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

DEFAULT_URI = "http://127.0.0.1:5000"
_BATCH = 1000  # metrics per request, MLflow's own limit
_logger = logging.getLogger(__name__)


def resolve_uri(tracking_uri: str) -> str:
    """Return the configured address, else MLFLOW_TRACKING_URI, else the local default."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "") or DEFAULT_URI


def check_server(uri: str, *, timeout_s: float = 10.0) -> None:
    """Raise CirError unless a tracking server answers at `uri` (sqlite: and file: stores need none)."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_s) as answer:  # noqa: S310 - http(s) only
            answer.read()
    except urllib.error.HTTPError as error:
        raise CirError(f"the tracking server at {uri} answers {error.code}: check --tracking_uri and access") from None
    except (OSError, ValueError) as error:
        raise CirError(
            f"no tracking server at {uri} ({error}): start one with `make up`, or set --tracking_uri or MLFLOW_TRACKING_URI"
        ) from None


def metric_name(name: str) -> str:
    """Return our metric name as MLflow allows it: recall@10 -> recall_at_10."""
    return name.replace("@", "_at_")


class Tracker:
    """One MLflow run. Everything names the run id, so any process may write to it."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self.client = mlflow.MlflowClient(uri)

    @classmethod
    def start(
        cls,
        uri: str,
        *,
        experiment: str,
        name: str,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: Tracker | None = None,
        run_id: str | None = None,
    ) -> Tracker:
        """Create a run, or go on with `run_id` if the server still has it, and log its parameters.

        Raises:
            CirError: the server refuses.
        """
        try:
            client = mlflow.MlflowClient(uri)
            if run_id is not None and _exists(client, run_id):
                client.update_run(run_id, status="RUNNING")
                return cls(uri, run_id)
            found = client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else client.create_experiment(experiment)
            nested = {"mlflow.parentRunId": parent.run_id} if parent else {}
            run = client.create_run(experiment_id, run_name=name, tags={**tags, **nested})
            tracker = cls(uri, run.info.run_id)
            tracker.log_parameters(parameters)
        except MlflowException as error:
            raise CirError(f"the tracking server at {uri} refuses: {str(error).splitlines()[0]}") from None
        return tracker

    @property
    def page(self) -> str:
        """Address of the run's page in the MLflow UI."""
        experiment_id = self.client.get_run(self.run_id).info.experiment_id
        return f"{self.uri}/#/experiments/{experiment_id}/runs/{self.run_id}"

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log parameters; a value longer than MLflow takes is cut, the whole is in the settings artifact."""
        params = [Param(key, str(value)[:6000]) for key, value in parameters.items()]
        for start in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log one value each; names as ours."""
        self.log_series([(step, metrics)])

    def log_series(self, series: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log (step, metrics) pairs in large batches."""
        now = int(time.time() * 1000)
        flat = [
            Metric(metric_name(key), float(value), now, step)
            for step, metrics in series
            for key, value in metrics.items()
        ]
        for start in range(0, len(flat), _BATCH):
            self.client.log_batch(self.run_id, metrics=flat[start : start + _BATCH])

    def logged_steps(self, name: str) -> set[int]:
        """Return the steps at which the server has a value of this metric."""
        return {item.step for item in self.client.get_metric_history(self.run_id, metric_name(name))}

    def log_folder(self, local_folder: str, path: str | None = None) -> None:
        """Log every file of a local folder as an artifact."""
        self.client.log_artifacts(self.run_id, local_folder, path)

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Log a table that the MLflow UI shows as one."""
        self.client.log_table(self.run_id, {key: list(values) for key, values in columns.items()}, name)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


def _exists(client: mlflow.MlflowClient, run_id: str) -> bool:
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def publish(action: Callable[[], None], *, patience_s: float = 120.0) -> bool:
    """Run `action`, which writes results to the server, again and again until it succeeds or patience ends.

    Returns:
        False if the server stayed away; the job's results are in its folder, and running the same command again
        publishes them.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            action()
            return True
        except (MlflowException, OSError) as error:
            if time.monotonic() > deadline:
                say(
                    f"warning: results are not in MLflow ({str(error).splitlines()[0]}); run the same command again to publish"
                )
                return False
            time.sleep(5.0)


def latest_finished(uri: str, experiment: str, job: str) -> dict[str, str] | None:
    """Return the tags of the newest finished run of a job, with its "name" and "run_id"; None if there is none."""
    client = mlflow.MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    runs = client.search_runs(
        [found.experiment_id],
        f"tags.job = '{job}' and attributes.status = 'FINISHED'",
        order_by=["attributes.end_time DESC"],
        max_results=1,
    )
    return {**runs[0].data.tags, "name": runs[0].info.run_name, "run_id": runs[0].info.run_id} if runs else None


class LiveMetrics:
    """Sends a run's metrics from a background thread; training never waits for the tracking server.

    Steps that the server already has (from before a failure) are not sent twice.
    """

    def __init__(self, uri: str, run_id: str, *, marker: str, interval_s: float = 2.0) -> None:
        self._uri, self._run_id, self._marker, self._interval_s = uri, run_id, marker, interval_s
        self._waiting: queue.SimpleQueue[tuple[int, Mapping[str, float]]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._monitor: SystemMetricsMonitor | None = None
        self._thread = threading.Thread(target=self._send_all, name="live-metrics", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over one step's metrics; returns at once."""
        self._waiting.put((step, metrics))

    def close(self, *, timeout_s: float = 20.0) -> None:
        """Send what waits, for at most `timeout_s`."""
        self._closing.set()
        self._thread.join(timeout_s)
        if self._monitor is not None:
            self._monitor.finish()

    def _send_all(self) -> None:
        tracker = Tracker(self._uri, self._run_id)
        sent: set[int] | None = None
        batch: list[tuple[int, Mapping[str, float]]] = []
        warned = False
        while True:
            closing = self._closing.wait(self._interval_s)
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            try:
                if sent is None:
                    sent = tracker.logged_steps(self._marker)
                    self._monitor = SystemMetricsMonitor(
                        self._run_id, sampling_interval=5, resume_logging=True, tracking_uri=self._uri
                    )
                    self._monitor.start()
                fresh = [item for item in batch if item[0] not in sent]
                if fresh:
                    tracker.log_series(fresh)
                    sent |= {step for step, _ in fresh}
                batch, warned = [], False
            except Exception as error:  # whatever the server does, training goes on
                if not warned:
                    _logger.warning("tracking server: %s; metrics wait", str(error).splitlines()[0])
                warned = True
            if closing:
                return
