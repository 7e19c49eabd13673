"""The local S3 server through its life: keys, ports, crashes, and what a shell gets from it."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from pathlib import Path

import processes
import psutil
import pytest
from botocore.exceptions import ClientError
from s3_server import load_server, s3_folder, start_s3


@pytest.fixture
def port(home, monkeypatch) -> int:
    """A free port that the server tries first; others on this machine may use the default."""
    found = processes.free_port("server")
    monkeypatch.setenv("CIR_S3_PORT", str(found))
    return found


def evaluated(script: str, before: dict[str, str]) -> dict[str, str]:
    """Return a shell's AWS_* variables after it has evaluated `script`."""
    line = ["sh", "-c", f"{script}\nenv"]
    printed = subprocess.run(
        line, env={"PATH": os.environ["PATH"], **before}, capture_output=True, text=True, check=True
    )
    return dict(item.split("=", 1) for item in printed.stdout.splitlines() if item.startswith("AWS_"))


def test_its_life(home, port):
    first = home.command("s3")
    assert first.returncode == 0, first.stderr
    record, server = home.state()["s3"], load_server()
    assert server.endpoint == record["url"] == f"http://127.0.0.1:{port}"
    assert home.listening() == {"127.0.0.1"}
    lines = home.command("s3-env").stdout
    assert lines in first.stdout
    elsewhere = {"AWS_PROFILE": "work", "AWS_SESSION_TOKEN": "theirs", "AWS_ENDPOINT_URL_S3": "http://elsewhere"}
    assert evaluated(lines, elsewhere) == server.environment()
    server.client().put_object(Bucket="cir", Key="kept/a", Body=b"before the crash")

    second = home.command("s3")
    assert "starting" not in second.stdout
    assert home.state()["s3"] == record

    psutil.Process(record["pid"]).kill()
    third = home.command("s3")
    assert third.returncode == 0, third.stderr
    assert home.state()["s3"]["pid"] != record["pid"]
    assert home.command("s3-env").stdout == lines  # the same port and keys: clients go on
    assert load_server().client().get_object(Bucket="cir", Key="kept/a")["Body"].read() == b"before the crash"

    sockets = load_server().sockets()
    assert all(Path(path).exists() for path in sockets)
    done = home.command("down")
    assert "stopped s3" in done.stdout
    assert home.processes() == []
    assert not any(Path(path).exists() for path in sockets)


def test_its_keys_are_the_owner_s_alone(home, port):
    assert home.command("s3").returncode == 0
    server = load_server()
    assert stat.S_IMODE((s3_folder() / "keys.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(s3_folder().stat().st_mode) == 0o700
    holders = [
        path
        for path in home.folder.rglob("*")
        if path.is_file() and (server.secret_key.encode() in path.read_bytes() or server.access_key.encode() in path.read_bytes())
    ]  # fmt: skip
    assert holders == [s3_folder() / "keys.json"]
    for process in processes.family(home.state()["s3"]):
        shown = " ".join(process.cmdline())
        assert server.secret_key not in shown
        assert server.access_key not in shown
    assert server.secret_key not in repr(server)


def test_other_keys_and_other_buckets_are_refused(home, port):
    state: dict[str, processes.Record] = {}
    server = start_s3(state)
    other = load_server()
    object.__setattr__(other, "secret_key", "0" * 40)
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        other.client().list_objects_v2(Bucket="cir")
    with pytest.raises(ClientError, match="NoSuchBucket"):
        server.client().put_object(Bucket="cri", Key="a", Body=b"")


def test_a_crash_and_a_restart_as_the_fault_campaign_does_it(home, port):
    state: dict[str, processes.Record] = {}
    server = start_s3(state)
    for number in range(20):
        server.client().put_object(Bucket="cir", Key=f"many/{number}", Body=bytes(100_000 * (number % 3)))
    assert processes.kill_now(state["s3"]) == 1
    assert not server.takes_writes()
    assert start_s3(state) == server
    listed = server.client().list_objects_v2(Bucket="cir", Prefix="many/")["Contents"]
    assert sorted((item["Key"], item["Size"]) for item in listed) == sorted(
        (f"many/{number}", 100_000 * (number % 3)) for number in range(20)
    )
    assert f"{20:8d} {sum(100_000 * (n % 3) for n in range(20)) / 1e6:10.2f} MB  s3://cir/many" in server.summary()


def test_a_busy_port_gives_another_one(home, port, monkeypatch, capsys):
    state: dict[str, processes.Record] = {}
    with socket.create_server(("127.0.0.1", port)):
        server = start_s3(state)
        assert f"port {port} (s3) is in use by another program; taking another one" in capsys.readouterr().out
        assert server.ports["s3.port"] != port
    monkeypatch.delenv("CIR_S3_PORT")
    processes.stop("s3", state.pop("s3"))
    assert start_s3(state) == server  # where it was before, not the default


def test_ports_that_were_taken_meanwhile_are_given_up_and_the_objects_kept(home, port, capsys):
    state: dict[str, processes.Record] = {}
    server = start_s3(state)
    server.client().put_object(Bucket="cir", Key="kept", Body=b"1")
    processes.stop("s3", state.pop("s3"))
    with (
        socket.create_server(("127.0.0.1", server.ports["master.port"])),
        socket.create_server(("127.0.0.1", port)),
    ):
        moved = start_s3(state)
        assert moved.ports["master.port"] != server.ports["master.port"]
        assert f"moves away from port {port}" in capsys.readouterr().out
        assert moved.client().get_object(Bucket="cir", Key="kept")["Body"].read() == b"1"
        assert moved.environment() == server.environment() | {"AWS_ENDPOINT_URL": moved.endpoint}


def test_the_variables_of_a_server_that_does_not_run_are_an_error_and_nothing_to_evaluate(home, port):
    done = home.command("s3-env")
    assert (done.returncode, done.stdout) == (1, "")
    assert "`make s3` starts it" in done.stderr
    assert home.command("s3").returncode == 0
    psutil.Process(home.state()["s3"]["pid"]).kill()
    done = home.command("s3-env")
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("damaged", ["", "{half", "[]", json.dumps({"identities": []})])
def test_a_damaged_key_file_is_named(home, port, damaged):
    s3_folder().mkdir(parents=True)
    (s3_folder() / "keys.json").write_text(damaged)
    done = home.command("s3")
    assert done.returncode == 1
    assert f"{s3_folder() / 'keys.json'} is damaged" in done.stderr
    assert "Traceback" not in done.stderr
    assert home.processes() == []
