"""Runs and live metrics against a real MLflow server that is killed, frozen and started again; wrong addresses."""

from __future__ import annotations

import http.server
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest

from cir_core.schema import CirError
from jobs import tracking
from jobs.tracking import LiveMetrics, Tracker, check_server, latest_finished, publish

UNKNOWN_RUN = "0" * 32


def test_metric_names_are_those_that_mlflow_takes():
    assert tracking.metric_name("recall@10") == "recall_at_10"
    assert tracking.metric_name("gap_before/matched cosine-1.5:x") == "gap_before/matched cosine-1.5:x"
    assert tracking.metric_name("worker's, (a) 50 %") == "worker_s_ _a_ 50 _"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """An MLflow server whose store outlives its processes."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, if it does not run, and wait until it answers."""
        if self.process is None:
            command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
            command += ["--backend-store-uri", f"sqlite:///{self.home / 'mlflow.db'}", "--workers", "1"]
            command += ["--artifacts-destination", str(self.home / "artifacts"), "--gunicorn-opts", "--timeout 120"]
            env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
            with (self.home / "server.log").open("ab") as log:
                self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 180
        while not self._answers():
            assert self.process.poll() is None, (self.home / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as reply:  # noqa: S310
                return bool(reply.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL every process of it."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)


@pytest.fixture(scope="module")
def one_server(tmp_path_factory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("mlflow"))
    yield found
    found.kill()


@pytest.fixture
def server(one_server, monkeypatch) -> Server:
    """The server, answering; a client that does not retry for seconds."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    one_server.start()
    return one_server


def new_run(server: Server, **more: object) -> Tracker:
    options = {"experiment": "tests", "name": "a run", "parameters": {}, "tags": {}, **more}
    return Tracker.start(server.uri, **options)  # type: ignore[arg-type]


def history(tracker: Tracker, name: str) -> list[tuple[int, float]]:
    return [(item.step, item.value) for item in tracker.client.get_metric_history(tracker.run_id, name)]


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Addresses


class Stranger(http.server.BaseHTTPRequestHandler):
    """Some other program on the port."""

    code, body, kind = 200, b"<html>hello</html>", "text/html"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.code)
        self.send_header("Content-Type", self.kind)
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[Callable[[int], str]]:
    opened = []

    def serve(code: int) -> str:
        found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("S", (Stranger,), {"code": code}))
        threading.Thread(target=found.serve_forever, daemon=True).start()
        opened.append(found)
        return f"http://127.0.0.1:{found.server_address[1]}"

    yield serve
    for found in opened:
        found.shutdown()
        found.server_close()


def refusal(uri: str, **options: float) -> str:
    with pytest.raises(CirError) as caught:
        check_server(uri, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "hush" not in text
    assert "MLFLOW_TRACKING" in text
    return text


@pytest.mark.parametrize("code", [200, 404, 500, 503])
def test_another_program_at_the_address_is_no_tracking_server(stranger, code):
    uri = stranger(code)
    started = time.monotonic()
    assert f"what answers at {uri} is no working MLflow server (it answers {code})" in refusal(uri)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("code", [401, 403])
def test_a_refused_access_names_the_variables(stranger, code):
    text = refusal(stranger(code).replace("http://", "http://someone:hush@"))
    assert f"refuses access ({code})" in text
    assert "MLFLOW_TRACKING_PASSWORD" in text


def test_a_closed_port_is_told_in_seconds():
    started = time.monotonic()
    text = refusal(f"http://someone:hush@127.0.0.1:{free_port()}")
    assert "no tracking server at http://127.0.0.1:" in text
    assert "Connection refused" in text
    assert "make up" in text
    assert time.monotonic() - started < 5


def test_a_port_that_never_answers_is_told_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        assert "timed out" in refusal(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=1.0).lower()
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "uri",
    ["mlflow:5000", "127.0.0.1:5000", "mlruns", "htp://h", "http://", "http://h:port", "http://h:99999", "ftp://h"],
)
def test_a_bad_address_is_named_with_an_example(uri):
    text = refusal(uri)
    assert repr(uri) in text
    assert "http://127.0.0.1:5000" in text


def test_a_host_that_is_not_there_is_named():
    assert "no tracking server at http://mlflow.invalid:5000" in refusal("http://mlflow.invalid:5000")


@pytest.mark.parametrize("uri", ["sqlite:///x.db", "file:///tmp/x", "postgresql+psycopg2://u:hush@h/db"])
def test_a_store_without_a_server_is_not_asked(uri):
    check_server(uri)


def test_the_address_comes_from_the_setting_then_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://b")
    assert tracking.resolve_uri("http://a") == "http://a"
    assert tracking.resolve_uri("") == "http://b"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.resolve_uri("") == tracking.DEFAULT_URI


def test_publish_gives_up_with_one_line_each(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker(f"http://someone:hush@127.0.0.1:{free_port()}", UNKNOWN_RUN)
    started = time.monotonic()
    assert publish(lambda: tracker.log_metrics({"x": 1.0}), patience_s=2) is False
    assert 2 <= time.monotonic() - started < 10
    first, last = capsys.readouterr().out.splitlines()
    assert "the tracking server does not take the results" in first
    assert last.startswith("warning: results are not in MLflow")
    assert "run the same command again to publish" in last
    assert "hush" not in first + last


def test_publish_does_not_hide_a_mistake_of_ours():
    with pytest.raises(KeyError):
        publish(lambda: {}["x"], patience_s=0)


# Runs


@pytest.mark.slow
def test_the_server_is_accepted_also_with_credentials_and_slash(server):
    check_server(server.uri)
    check_server(f"{server.uri}/")
    check_server(server.uri.replace("http://", "http://someone:hush@"))


@pytest.mark.slow
def test_a_run_holds_parameters_and_tags_without_credentials(server):
    uri = server.uri.replace("http://", "http://someone:hush@")
    secret = {"data": "s3://KEYID:hush@bucket/x", "long": "y" * 9000, "lr": 1e-4, "none": None}
    parent = new_run(server)
    tracker = Tracker.start(
        uri, experiment="tests", name="child", parameters=secret, tags={"job": "t", "at": secret["data"]}, parent=parent
    )
    tracker.tag({"adapter_uri": "s3://KEYID:hush@bucket/adapter"})
    run = tracker.client.get_run(tracker.run_id)
    assert run.data.params == {"data": "s3://bucket/x", "long": "y" * 6000, "lr": "0.0001", "none": "None"}
    assert run.data.tags["at"] == "s3://bucket/x"
    assert run.data.tags["adapter_uri"] == "s3://bucket/adapter"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert (run.info.run_name, run.info.status) == ("child", "RUNNING")
    assert tracker.page.startswith(f"{server.uri}/#/experiments/{run.info.experiment_id}/runs/{tracker.run_id}")
    tracker.finish()
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_many_parameters_arrive(server):
    tracker = new_run(server, parameters={f"p{number}": number for number in range(250)})
    assert len(tracker.client.get_run(tracker.run_id).data.params) == 250


@pytest.mark.slow
def test_start_goes_on_with_a_known_run(server):
    first = new_run(server, parameters={"lr": 1})
    first.finish("FAILED")
    second = new_run(server, parameters={"lr": 1}, run_id=first.run_id)
    assert second.run_id == first.run_id
    assert second.client.get_run(second.run_id).info.status == "RUNNING"


@pytest.mark.slow
def test_start_makes_a_new_run_where_the_server_lost_it(server):
    deleted = new_run(server)
    deleted.client.delete_run(deleted.run_id)
    for lost in (UNKNOWN_RUN, deleted.run_id):
        tracker = new_run(server, run_id=lost, parameters={"lr": 1})
        assert tracker.run_id != lost
        assert tracker.client.get_run(tracker.run_id).data.params == {"lr": "1"}


@pytest.mark.slow
def test_jobs_that_start_at_once_share_one_new_experiment(server):
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda number: new_run(server, experiment="fresh", name=str(number)), range(4)))
    assert len({run.client.get_run(run.run_id).info.experiment_id for run in runs}) == 1


@pytest.mark.slow
def test_a_deleted_experiment_is_named(server):
    client = mlflow.MlflowClient(server.uri)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(CirError, match=r"experiment 'gone' is deleted .*--experiment"):
        new_run(server, experiment="gone")


@pytest.mark.slow
def test_a_server_that_is_gone_at_the_start_is_one_line(server):
    server.kill()
    with pytest.raises(CirError, match=r"the tracking server at http://127") as caught:
        new_run(server)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_latest_finished_is_the_newest_of_that_job(server):
    assert latest_finished(server.uri, "no such experiment", "tat_train") is None
    assert latest_finished(server.uri, "tests", "tat_train") is None
    for name, job, status in [
        ("old", "tat_train", "FINISHED"),
        ("new", "tat_train", "FINISHED"),
        ("other", "embed", "FINISHED"),
        ("failed", "tat_train", "FAILED"),
        ("running", "tat_train", None),
    ]:
        tracker = new_run(server, name=name, tags={"job": job, "adapter_uri": f"/{name}"})
        if status:
            tracker.finish(status)
        time.sleep(0.01)
    found = latest_finished(server.uri, "tests", "tat_train")
    assert found is not None
    assert (found["name"], found["adapter_uri"]) == ("new", "/new")


@pytest.mark.slow
def test_results_of_every_kind_arrive(server, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.png").write_bytes(b"png")
    tracker = new_run(server)
    tracker.log_series([(step, {"recall@10": step / 10, "loss": float(step)}) for step in range(1500)])
    tracker.log_folder(str(tmp_path))
    tracker.log_table({"query": ["a", "b"], "rank": [1, None]}, "per_query.json")
    assert history(tracker, "recall_at_10") == [(step, step / 10) for step in range(1500)]
    assert tracker.logged_steps("recall@10") == set(range(1500))
    assert tracker.logged_steps("nothing") == set()
    assert [item.path for item in tracker.client.list_artifacts(tracker.run_id, "plots")] == ["plots/a.png"]
    table = tracker.client.download_artifacts(tracker.run_id, "per_query.json", str(tmp_path))
    assert json.loads(Path(table).read_text())["columns"] == ["query", "rank"]


# Outages


@pytest.fixture
def fast_system_metrics(monkeypatch):
    monkeypatch.setattr(tracking, "_SYSTEM_EVERY_S", 0.5)


@pytest.mark.slow
def test_live_metrics_survive_a_killed_server(server, caplog, fast_system_metrics):
    tracker = new_run(server)
    live = LiveMetrics(server.uri, tracker.run_id, marker="loss", interval_s=0.2)
    for step in range(5):
        live.log(step, {"loss": float(step), "recall@1": 0.5})
    wait_for(lambda: len(history(tracker, "loss")) == 5)
    server.kill()
    slowest, said = 0.0, {}
    with caplog.at_level(logging.WARNING, "jobs.tracking"):
        for step in range(5, 305):
            said[step] = time.time()
            started = time.perf_counter()
            live.log(step, {"loss": float(step), "recall@1": 0.5})
            slowest = max(slowest, time.perf_counter() - started)
            time.sleep(0.005)
        wait_for(lambda: "metrics wait" in caplog.text)
        outage = time.time()
        server.start()
    assert slowest < 0.1
    assert caplog.text.count("metrics wait") == 1
    assert max(len(record.getMessage()) for record in caplog.records if record.name == "jobs.tracking") < 160
    live.close()
    assert history(tracker, "loss") == [(step, float(step)) for step in range(305)]
    assert len(history(tracker, "recall_at_1")) == 305
    times = {item.step: item.timestamp for item in tracker.client.get_metric_history(tracker.run_id, "loss")}
    assert all(abs(times[step] / 1000 - at) < 0.5 for step, at in said.items())  # of measuring, not of sending
    load = tracker.client.get_metric_history(tracker.run_id, "system/cpu_utilization_percentage")
    assert any(item.timestamp / 1000 > outage for item in load)  # the machine's load goes on
    assert [item.step for item in load] == sorted(item.step for item in load)
    assert len({item.timestamp for item in load}) == len(load)


@pytest.mark.slow
def test_a_worker_that_starts_again_sends_no_step_twice(server):
    tracker = new_run(server)
    for steps, value in ((range(0, 20), 1.0), (range(10, 30), 2.0)):  # the second goes on from an older checkpoint
        live = LiveMetrics(server.uri, tracker.run_id, marker="loss", interval_s=0.1)
        for step in steps:
            live.log(step, {"loss": value, "lr": value})
        live.close()
    expected = [(step, 1.0 if step < 20 else 2.0) for step in range(30)]
    assert history(tracker, "loss") == expected
    assert history(tracker, "lr") == expected


class DropsAnswers(threading.Thread):
    """Passes connections on to the server, but loses the answers to the first `count` log-batch requests."""

    def __init__(self, port: int, count: int) -> None:
        super().__init__(daemon=True)
        self.target, self.left = port, count
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            while True:
                request = self.whole(client)
                if not request:
                    return
                server.sendall(request)
                answer = self.whole(server)
                if b"log-batch" in request.partition(b"\r\n")[0] and self.left > 0:
                    self.left -= 1
                    return  # the server has done it; the client will never know
                client.sendall(answer)

    @staticmethod
    def whole(sock: socket.socket) -> bytes:
        """Read one HTTP message with a Content-Length."""
        data = b""
        while b"\r\n\r\n" not in data:
            part = sock.recv(1 << 16)
            if not part:
                return b""
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        sizes = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
        while len(body) < int(sizes[0] if sizes else 0):
            body += sock.recv(1 << 16)
        return head + b"\r\n\r\n" + body


@pytest.mark.slow
def test_what_was_stored_without_an_answer_is_not_stored_twice(server):
    proxy = DropsAnswers(server.port, count=3)
    direct = new_run(server)
    live = LiveMetrics(proxy.uri, direct.run_id, marker="loss", interval_s=0.2)
    for step in range(10):
        live.log(step, {"loss": 0.5 * step, "grad_norm": float("nan")})
        time.sleep(0.1)
    live.close()
    assert proxy.left < 3
    through = Tracker(proxy.uri, direct.run_id)
    proxy.left = 2
    assert publish(lambda: through.log_series([(0, {"recall@1": 0.5}), (1, {"recall@1": 0.6})]), patience_s=30)
    proxy.listener.close()
    assert history(direct, "loss") == [(step, 0.5 * step) for step in range(10)]
    assert len(history(direct, "grad_norm")) == 10
    assert history(direct, "recall_at_1") == [(0, 0.5), (1, 0.6)]


@pytest.mark.slow
def test_close_does_not_wait_for_a_frozen_server(server, caplog, fast_system_metrics):
    tracker = new_run(server)
    live = LiveMetrics(server.uri, tracker.run_id, marker="loss", interval_s=0.1)
    live.log(0, {"loss": 1.0})
    wait_for(lambda: len(history(tracker, "loss")) == 1)
    server.signal(signal.SIGSTOP)
    try:
        live.log(1, {"loss": 2.0})
        time.sleep(0.5)
        started = time.monotonic()
        live.close(timeout_s=2)
        assert time.monotonic() - started < 4
        assert "could not be sent" in caplog.text
    finally:
        server.signal(signal.SIGCONT)
    live._thread.join(60)  # the request that was under way ends; the thread does not live on
    assert not live._thread.is_alive()


@pytest.mark.slow
def test_publish_waits_for_a_server_that_comes_back(server, tmp_path, capsys):
    (tmp_path / "table.txt").write_text("x")
    tracker = new_run(server)
    server.kill()
    back = threading.Thread(target=server.start)

    def write() -> None:
        tracker.log_metrics({"recall@10": 0.25})
        tracker.log_folder(str(tmp_path))
        tracker.finish()

    threading.Timer(1.0, back.start).start()
    assert publish(write, patience_s=180)
    back.join()
    assert "trying for" in capsys.readouterr().out
    assert history(tracker, "recall_at_10") == [(0, 0.25)]
    assert [item.path for item in tracker.client.list_artifacts(tracker.run_id)] == ["table.txt"]
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"
