"""MLflow; nothing else imports it. Runs with explicit ids, live metrics that never block, results that are not lost.

A tracking server may go away while a job runs. Live metrics wait in memory and are sent later; what must not be lost is
in the run's folder first and is published from there at the end, or by the next run of the same command.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self
from urllib.parse import urlsplit

from cir_core.schema import CirError
from jobs.config import public
from jobs.session import say

# Short retries inside the client, long ones in our own hands, where they can be told about.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

DEFAULT_URI = "http://127.0.0.1:5000"
_BATCH = 1000  # metrics per request, MLflow's own limit
_STORES = ("sqlite", "postgresql", "mysql", "mssql", "file")  # schemes of stores that are opened without a server
_SYSTEM_EVERY_S = 5.0
_logger = logging.getLogger(__name__)


def resolve_uri(tracking_uri: str) -> str:
    """Return the configured address, else MLFLOW_TRACKING_URI, else the local default."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "") or DEFAULT_URI


def check_server(uri: str, *, timeout_s: float = 10.0) -> None:
    """Raise CirError unless an MLflow server answers at `uri` and lets us in (sqlite: and file: stores need none)."""
    shown = public(uri)
    way_out = "set --tracking_uri or MLFLOW_TRACKING_URI"
    try:
        parts = urlsplit(uri)
        sound = parts.scheme.partition("+")[0] in _STORES or (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        )
    except ValueError:  # a port that is no number
        sound = False
    if not sound:
        raise CirError(f"{shown!r} is no address of a tracking server: expected one like {DEFAULT_URI}; {way_out}")
    if parts.scheme not in ("http", "https"):
        return
    path = (
        "/api/2.0/mlflow/experiments/search"  # not /health, which needs no permission and other programs have as well
    )
    try:
        creds = get_default_host_creds(uri)
        answer = http_request(
            creds, path, "POST", json={"max_results": 1}, timeout=timeout_s, max_retries=0, raise_on_status=False
        )
        code, is_mlflow = answer.status_code, answer.headers.get("Content-Type", "").startswith("application/json")
    except (MlflowException, OSError, ValueError) as error:
        raise CirError(
            f"no tracking server at {shown} ({_reason(error)}): start one with `make up`, or {way_out}"
        ) from None
    if code in (401, 403):
        raise CirError(
            f"the tracking server at {shown} refuses access ({code}): check MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN, and the hosts that the server allows"
        )
    if code != 200 or not is_mlflow:
        raise CirError(f"what answers at {shown} is no working MLflow server (it answers {code}); {way_out}")


def _reason(error: BaseException) -> str:
    """Return what went wrong in one line, without credentials: the network's own words if it is the network."""
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(below)
    told = chain[-1] if any(isinstance(item, OSError) for item in chain) else error
    lines = str(told).strip().splitlines() or [type(told).__name__]
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1", lines[0])


def metric_name(name: str) -> str:
    """Return our metric name as MLflow allows it: recall@10 -> recall_at_10, and _ for all else that it refuses."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


class Tracker:
    """One MLflow run. Everything names the run id, so any process may write to it."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self.client = mlflow.MlflowClient(uri)
        self._logged_at: dict[tuple[str, int, str], int] = {}

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
                return cls(uri, run_id)._located()
            nested = {"mlflow.parentRunId": parent.run_id} if parent else {}
            run = client.create_run(_experiment_id(client, experiment), run_name=name, tags={**_texts(tags), **nested})
            tracker = cls(uri, run.info.run_id)
            tracker.log_parameters(parameters)
            tracker._located()
        except (MlflowException, OSError) as error:
            raise CirError(f"the tracking server at {public(uri)} refuses: {_reason(error)}") from None
        return tracker

    def _located(self) -> Self:
        """Ask for the page once, while the server is known to answer."""
        _ = self.page
        return self

    @cached_property
    def page(self) -> str:
        """Address of the run's page in the MLflow UI."""
        experiment_id = self.client.get_run(self.run_id).info.experiment_id
        return f"{public(self.uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{self.run_id}"

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log parameters; a value longer than MLflow takes is cut, the whole is in the settings artifact."""
        params = [Param(key, value[:6000]) for key, value in _texts(parameters).items()]
        for start in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log one value each; names as ours."""
        self.log_series([(step, metrics)])

    def log_series(self, series: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log (step, metrics) pairs in large batches. The same again, after a failure, adds nothing twice."""
        now = int(time.time() * 1000)
        self.log_points(
            [
                # a point is what MLflow stores once: name, step, value and time
                Metric(metric_name(key), float(value), self._logged_at.setdefault((key, step, repr(value)), now), step)
                for step, metrics in series
                for key, value in metrics.items()
            ]
        )

    def log_points(self, points: Sequence[Metric]) -> None:
        """Log points that have their time."""
        for start in range(0, len(points), _BATCH):
            self.client.log_batch(self.run_id, metrics=points[start : start + _BATCH])

    def logged_steps(self, name: str) -> set[int]:
        """Return the steps at which the server has a value of this metric."""
        return {item.step for item in self.client.get_metric_history(self.run_id, metric_name(name))}

    def log_folder(self, local_folder: str, path: str | None = None) -> None:
        """Log every file of a local folder as an artifact."""
        self.client.log_artifacts(self.run_id, local_folder, path)

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        """Log a table that the MLflow UI shows as one; one that is there stays, since MLflow would append to it."""
        if name in {item.path for item in self.client.list_artifacts(self.run_id, name.rpartition("/")[0] or None)}:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "For backward compatibility, 'str' dtypes")  # MLflow's use of pandas
            self.client.log_table(self.run_id, {key: list(values) for key, values in columns.items()}, name)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in _texts(tags).items()])

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


def _experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    """Return the id of an experiment, making it if absent; two jobs may do so at once."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise CirError(
            f"experiment {name!r} is deleted on the tracking server: restore it, or choose another --experiment"
        )
    return str(found.experiment_id)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(public(value)) for key, value in values.items()}


def publish(action: Callable[[], None], *, patience_s: float = 120.0) -> bool:
    """Run `action`, which writes results to the server, again and again until it succeeds or patience ends.

    Returns:
        False if the server stayed away; the job's results are in its folder, and running the same command again
        publishes them.
    """
    deadline = time.monotonic() + patience_s
    told = False
    while True:
        try:
            action()
            return True
        except (MlflowException, OSError, CirError) as error:  # a CirError of Tracker.start: the server refuses
            left = deadline - time.monotonic()
            if left <= 0:
                say(f"warning: results are not in MLflow ({_reason(error)}); run the same command again to publish")
                return False
            if not told:
                say(f"the tracking server does not take the results ({_reason(error)}); trying for {left:.0f} s")
                told = True
            time.sleep(min(5.0, left))


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
    """Sends a run's metrics, and the machine's, from a background thread; training never waits for the tracking server.

    Steps that the server already has (from before a failure) are not sent twice. Points carry the time at which they
    were measured, however late they are sent.
    """

    def __init__(self, uri: str, run_id: str, *, marker: str, interval_s: float = 2.0) -> None:
        self._uri, self._run_id, self._marker, self._interval_s = uri, run_id, marker, interval_s
        self._waiting: queue.SimpleQueue[tuple[int, int, dict[str, float]]] = queue.SimpleQueue()
        self._unsent: list[tuple[int, int, dict[str, float]]] = []  # time in ms, step, metrics
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="live-metrics", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over one step's metrics; returns at once."""
        self._waiting.put((int(time.time() * 1000), step, dict(metrics)))

    def close(self, *, timeout_s: float = 20.0) -> None:
        """Send what waits, for at most `timeout_s`."""
        self._closing.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive() or self._unsent:
            _logger.warning("tracking server: the last metrics could not be sent")

    def _send_all(self) -> None:
        tracker = Tracker(self._uri, self._run_id)
        system = _SystemMetrics(self._run_id, self._uri)
        sent: set[int] | None = None
        warned = False
        while True:
            closing = self._closing.wait(self._interval_s)
            while not self._waiting.empty():
                self._unsent.append(self._waiting.get())
            system.sample()
            try:
                if sent is None:
                    sent = tracker.logged_steps(self._marker)
                    began = int(tracker.client.get_run(self._run_id).info.start_time)
                fresh = [item for item in self._unsent if item[1] not in sent]
                tracker.log_points(
                    [Metric(metric_name(k), float(v), at, step) for at, step, row in fresh for k, v in row.items()]
                )
                sent |= {step for _, step, _ in fresh}
                self._unsent, warned = [], False
                system.send(tracker, began)
            except Exception as error:  # whatever the server does, training goes on
                if not warned:
                    _logger.warning("tracking server: %s; metrics wait", _reason(error))
                warned = True
            if closing:
                return


class _SystemMetrics:
    """This machine's load, measured by MLflow's own monitors; its own thread would end at the first outage."""

    def __init__(self, run_id: str, uri: str) -> None:
        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # it tells of GPUs that are not there
        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)
        self._samples: deque[tuple[int, dict[str, float]]] = deque(maxlen=10_000)  # half a day
        self._next = 0.0

    def sample(self) -> None:
        """Measure if it is time."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _SYSTEM_EVERY_S
        try:
            self._monitor.collect_metrics()
            found = {f"system/{name}": float(value) for name, value in self._monitor.aggregate_metrics().items()}
        except Exception as error:  # a sensor that fails is no reason to stop sending the run's own metrics
            _logger.debug("system metrics: %s", error)
            return
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        self._samples.append((int(time.time() * 1000), found))

    def send(self, tracker: Tracker, began: int) -> None:
        """Send what was measured; the step is the number of seconds since the run began, so a restart goes on."""
        samples = list(self._samples)
        tracker.log_points([Metric(k, v, at, (at - began) // 1000) for at, row in samples for k, v in row.items()])
        self._samples.clear()
