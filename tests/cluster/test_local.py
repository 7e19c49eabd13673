"""`make up` and `make down` on real processes, in a folder and on ports of the test's own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import psutil
import pytest

SCRIPT = Path(processes.__file__).with_name("cluster.py")

# A server that answers, with a child that has left its session and ignores SIGTERM.
SERVER = """
import http.server, signal, subprocess, sys
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.PIPE)
process.stdout.readline()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


@contextlib.contextmanager
def bystander() -> Iterator[psutil.Popen]:
    """A process of somebody else's that leads its session and has a child in it."""
    script = (
        "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); print('up', flush=True); time.sleep(600)"
    )
    process = psutil.Popen([sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_stale_record_with_a_reused_pid_kills_nothing(home):
    with bystander() as other:
        record = {"pid": other.pid, "started": other.create_time() - 1000, "mark": "m", "url": "http://127.0.0.1:9"}
        for stale in (record, {key: value for key, value in record.items() if key != "mark"}):
            processes.save_state({"ray": stale, "mlflow": stale})
            done = home.command("down")
            assert done.returncode == 0
            assert done.stdout.count("was not running") == 2
            assert not (home.folder / "cluster.json").exists()
            assert other.is_running()
            assert [child.is_running() for child in other.children()] == [True]


def test_a_stale_record_of_a_session_whose_leader_has_died_kills_nothing(home):
    script = "import subprocess as s; print(s.Popen(['sleep', '600'], stdout=s.DEVNULL).pid)"
    leader = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE)
    child = psutil.Process(int(leader.communicate()[0]))
    try:
        assert os.getsid(child.pid) == leader.pid  # a daemon whose session has the number of a server of ours
        old = {"pid": leader.pid, "started": child.create_time() - 1000, "mark": "m", "url": "http://127.0.0.1:9"}
        processes.save_state({"ray": old})
        assert home.command("down").returncode == 0
        assert child.is_running()
    finally:
        child.kill()


def start_server(*command_line: str, ready: str) -> subprocess.CompletedProcess[str]:
    """Start a server as `up` does, from a process that ends afterwards."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import processes;"
        "state = {}; processes.start(state, 'server', sys.argv[3:], {}, {'url': sys.argv[2]}, ready=sys.argv[2]);"
        "processes.finish_start(state, 'server')"
    )
    line = [sys.executable, "-c", code, str(SCRIPT.parent), ready, *command_line]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("kill_leader", [False, True])
def test_stop_finds_children_that_left_the_session_and_ignore_sigterm(home, kill_leader, monkeypatch, capsys):
    end = processes.end
    monkeypatch.setattr(processes, "end", lambda *args, timeout_s: end(*args, timeout_s=min(timeout_s, 1)))
    port = str(processes.free_port("server"))
    assert start_server(sys.executable, "-c", SERVER, port, ready=f"http://127.0.0.1:{port}/").returncode == 0
    record = home.state()["server"]
    assert len(processes.family(record)) == 2
    if kill_leader:
        leader = psutil.Process(int(str(record["pid"])))
        leader.kill()
        psutil.wait_procs([leader], timeout=10)
        assert processes.alive(record) is None
        assert len(processes.family(record)) == 1
    processes.stop("server", record)
    assert processes.family(record) == []
    assert home.processes() == []
    assert "stopped server" in capsys.readouterr().out


def test_stop_remembers_processes_that_only_their_marked_kin_gave_away(home, monkeypatch):
    """Ray overwrites the environment of some processes; they outlive SIGTERM while the marked ones die of it."""
    end = processes.end
    monkeypatch.setattr(processes, "end", lambda *args, timeout_s: end(*args, timeout_s=min(timeout_s, 1)))
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    script = (
        "import os, subprocess, sys, time; env = dict(os.environ); env.pop(sys.argv[1]);"
        "a = subprocess.Popen(['sleep', '600']); b = subprocess.Popen([sys.executable, '-c', sys.argv[2]], env=env);"
        "print(b.pid, flush=True); time.sleep(600)"
    )
    line = [sys.executable, "-c", script, processes.MARK, deaf]
    env = {**os.environ, processes.MARK: "of this test"}
    with subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as leader:
        unmarked = psutil.Process(int(sorted(leader.stdout.readline() for _ in range(2))[0]))
        record = {"pid": leader.pid, "started": psutil.Process(leader.pid).create_time(), "mark": "of this test"}
        leader.kill()
        leader.wait()
        assert len(processes.family(record)) == 2
        processes.stop("server", record)
    assert not processes.running(unmarked)


def test_a_server_that_dies_is_reported_with_its_log_and_leaves_nothing(home):
    done = start_server(sys.executable, "-c", "raise SystemExit('no such thing')", ready="http://127.0.0.1:9/")
    assert re.search(
        r"StartError: no answer from http://127\.0\.0\.1:9/, see .*server\.log:\nno such thing", done.stderr
    )
    assert home.state() == {}
    assert home.processes() == []


def test_a_busy_default_port_gives_another_one_and_a_message(home, monkeypatch, capsys):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        monkeypatch.setenv("CIR_DASHBOARD_PORT", str(port))
        other = processes.free_port("dashboard")
        assert other != port
        assert f"port {port} (dashboard) is in use" in capsys.readouterr().out
    assert processes.free_port("dashboard") == port
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["80", "70000", "http", "-1"])
def test_a_port_that_is_none_is_refused(home, monkeypatch, text):
    monkeypatch.setenv("CIR_MLFLOW_PORT", text)
    done = home.command("up")
    assert done.returncode == 1
    assert f"error: CIR_MLFLOW_PORT={text!r} is not a port" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_usage_and_nothing_to_do(home):
    for arguments in ([], ["start"], ["up", "now"]):
        done = home.command(*arguments)
        assert done.returncode == 2
        assert "usage: cluster.py" in done.stderr
        assert "Traceback" not in done.stderr
    done = home.command("down")
    assert (done.returncode, done.stdout) == (0, "nothing to stop\n")


def test_a_damaged_state_file_is_named(home):
    home.folder.mkdir(parents=True)
    (home.folder / "cluster.json").write_text("{half")
    done = home.command("down")
    assert done.returncode == 1
    assert "cluster.json is damaged" in done.stderr
    (home.folder / "cluster.json").unlink()


def test_a_second_command_waits_for_the_first(home):
    with processes.locked():
        waiting = subprocess.Popen([sys.executable, str(SCRIPT), "down"], stdout=subprocess.PIPE, text=True)
        assert waiting.stdout is not None
        assert "waiting for it" in waiting.stdout.readline()
        assert waiting.poll() is None
    assert waiting.communicate(timeout=30)[0] == "nothing to stop\n"


@pytest.mark.slow
def test_a_killed_up_leaves_nothing_that_down_does_not_know(home):
    starting = subprocess.Popen([sys.executable, str(SCRIPT), "up"], stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while all(process.pid == starting.pid for process in home.processes()):  # its record is there before the server
        assert time.monotonic() < deadline
        time.sleep(0.05)
    starting.kill()
    starting.wait()
    assert home.processes()
    assert "stopped mlflow" in home.command("down").stdout
    assert home.processes() == []


def test_a_server_is_known_before_it_starts(home, monkeypatch):
    """`up` killed right after the start of a server, before it has learnt its pid."""
    real, started = subprocess.Popen, []

    def killed_after(*args, **options):
        started.append(real(*args, **options))
        while processes.MARK not in psutil.Process(started[0].pid).environ():  # exec returns before it shows it
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.subprocess, "Popen", killed_after)
    with pytest.raises(KeyboardInterrupt):
        processes.start({}, "server", ["sleep", "600"], {}, {"url": "http://127.0.0.1:9"}, ready="http://127.0.0.1:9")
    monkeypatch.undo()
    monkeypatch.setenv("CIR_RUN_DIR", str(home.folder))
    try:
        processes.stop("server", home.state()["server"])
        assert started[0].wait(timeout=10)
    finally:
        started[0].kill()


@pytest.mark.slow
def test_up_and_down(home, monkeypatch):
    """One Ray head and one MLflow server through their life: busy ports, reuse, a killed head, down."""
    before = {process.pid for process in psutil.process_iter()}
    with contextlib.ExitStack() as stack:
        for name in ("GCS", "DASHBOARD", "MLFLOW"):
            busy = stack.enter_context(socket.socket())
            busy.bind(("127.0.0.1", 0))
            busy.listen()
            monkeypatch.setenv(f"CIR_{name}_PORT", str(busy.getsockname()[1]))
        first = home.command("up")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("is in use by another program; taking another one") == 3
    records = home.state()
    assert str(records["ray"]["url"]) in first.stdout
    assert f"export RAY_API_SERVER_ADDRESS={records['ray']['url']}" in first.stdout
    assert processes.answers(f"{records['mlflow']['url']}/health")

    temporary = [
        part.partition("=")[2] for part in psutil.Process(records["ray"]["pid"]).cmdline() if "--temp-dir=" in part
    ]

    assert home.listening() == {"127.0.0.1"}

    second = home.command("up")
    assert second.returncode == 0
    assert "starting" not in second.stdout
    assert home.state() == records

    os.kill(int(str(records["ray"]["pid"])), signal.SIGKILL)  # `ray start`; the head's servers live on
    left = processes.family(records["ray"])
    assert left
    third = home.command("up")
    assert third.returncode == 0, third.stderr
    assert "stopped ray" in third.stdout
    assert "starting the Ray head" in third.stdout
    assert "starting the MLflow server" not in third.stdout
    assert [process for process in left if processes.running(process)] == []
    assert home.state()["mlflow"] == records["mlflow"]
    assert home.state()["ray"]["pid"] != records["ray"]["pid"]
    later = home.state()["ray"]
    assert processes.answers(f"{later['url']}/api/version")

    done = home.command("down")
    assert done.returncode == 0
    assert "stopped mlflow" in done.stdout
    assert "stopped ray" in done.stdout
    assert home.processes() == []
    assert not (home.folder / "cluster.json").exists()
    for folder in temporary:
        shutil.rmtree(folder)
    sessions = {int(str(record["pid"])) for record in (*records.values(), later)}
    for process in psutil.process_iter():
        if process.pid not in before and processes.running(process):
            with contextlib.suppress(ProcessLookupError):
                assert os.getsid(process.pid) not in sessions, process


def test_a_port_of_another_protocol_is_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reply() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00 as gRPC greets\r\n\r\n")

        thread = threading.Thread(target=reply)
        thread.start()
        assert not processes.answers(f"http://127.0.0.1:{server.getsockname()[1]}/")
        thread.join()


def test_the_next_port_is_taken_when_the_default_is_in_use(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        monkeypatch.setenv("CIR_MLFLOW_PORT", str(taken))
        assert taken < processes.free_port("mlflow") <= taken + 50
    assert f"port {taken} (mlflow) is in use" in capsys.readouterr().out
