"""Servers as processes that can be killed and started again on the same ports and data: the S3 server and the fault proxy."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs

HOST = "127.0.0.1"
ACCESS_KEY, SECRET_KEY, BUCKET = "chaos", "chaos-secret", "chaos"
_IDENTITIES = {
    "identities": [
        {
            "name": "chaos",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
}


def free_ports(number: int, below: int = 20_000) -> list[int]:
    """Return free ports below those that Ray's workers use; SeaweedFS takes each port + 10000 for gRPC as well."""
    found: list[int] = []
    port = 11_000 + os.getpid() % 4000
    while len(found) < number:
        port += 1
        if port >= below:
            raise RuntimeError("no free ports")
        if all(_is_free(one) for one in (port, port + 10_000)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def call(url: str, value: Any = None, timeout_s: float = 10) -> Any:
    """GET a URL, or POST a value to it as JSON; returns the parsed reply, None if it is empty."""
    data = None if value is None else json.dumps(value).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - our own addresses
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:  # noqa: S310
        text = reply.read()
    return json.loads(text) if text else None


class Process:
    """A server of ours: started in a session of its own with its output in a log file."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self.command, self.log, self.environment = command, log, dict(environment)
        self.running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or again after a kill."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.running = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def kill(self) -> bool:
        """SIGKILL it and whatever it started; returns whether it was alive."""
        if self.running is None or self.running.poll() is not None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.running.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self.running.kill()
        self.running.wait()
        return True

    def check_alive(self) -> None:
        """Raise RuntimeError with the end of the log if it has ended."""
        if self.running is None or self.running.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.command[0]} has ended:\n{tail}")


class S3Server:
    """SeaweedFS on loopback, all of its parts in one process; objects survive `process.kill()` and `start()`."""

    def __init__(self, home: Path) -> None:
        data = home / "s3"
        data.mkdir(parents=True, exist_ok=True)
        keys = home / "keys.json"
        keys.write_text(json.dumps(_IDENTITIES))
        master, volume, filer, s3 = free_ports(4)
        self.url = f"http://{HOST}:{s3}"
        weed = Path(sys.executable).parent / "weed"
        command = [
            str(weed), "-logtostderr=true", "server", f"-dir={data}", f"-ip={HOST}", f"-ip.bind={HOST}",
            f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}", "-filer", "-s3",
            f"-s3.config={keys}", "-master.telemetry=false", "-master.electionTimeout=1s",
            "-master.heartbeatInterval=100ms", "-volume.preStopSeconds=1", "-master.volumeSizeLimitMB=1024",
            "-volume.max=16", "-master.volumePreallocate=false", "-s3.autoCreateBucket=false", "-webdav=false",
        ]  # fmt: skip
        self.process = Process(command, home / "logs" / "s3.log", {**os.environ, "GOMEMLIMIT": "256MiB"})

    def start(self, timeout_s: float = 60) -> None:
        """Start and wait until a write succeeds: the server's own status says so too early."""
        self.process.start()
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._write()
                return
            except OSError as error:
                self.process.check_alive()
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the S3 server takes no writes after {timeout_s:g} s: {error}") from error
                time.sleep(0.3)

    def _write(self) -> None:
        client = self.client()
        client.create_dir(BUCKET)
        with client.open_output_stream(f"{BUCKET}/.ready") as stream:
            stream.write(b"ready")

    def client(self, url: str | None = None) -> pafs.S3FileSystem:
        """Return the client that the jobs use, for this server or for a proxy in front of it."""
        host = (url or self.url).partition("://")[2]
        return pafs.S3FileSystem(
            access_key=ACCESS_KEY, secret_key=SECRET_KEY, region="us-east-1", scheme="http", endpoint_override=host,
            allow_bucket_creation=True,
        )  # fmt: skip


class ProxyServer:
    """The fault proxy as a process, and its control address."""

    def __init__(self, home: Path, upstream: str) -> None:
        port, control = free_ports(2)
        self.url, self._control = f"http://{HOST}:{port}", f"http://{HOST}:{control}"
        script = Path(__file__).with_name("proxy.py")
        command = [sys.executable, str(script), "--upstream", upstream, "--port", str(port)]
        command += ["--control_port", str(control)]
        self.process = Process(command, home / "logs" / "proxy.log", os.environ)

    def start(self, timeout_s: float = 30) -> None:
        """Start and wait until it answers."""
        self.process.start()
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.report()
                return
            except OSError:
                self.process.check_alive()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def plan(self, faults: Mapping[str, int], *, rate: float, seed: int, pace: float = 0) -> None:
        """Set what is injected from now on; see proxy.py."""
        call(f"{self._control}/plan", {"faults": dict(faults), "rate": rate, "seed": seed, "pace": pace})

    def set_pace(self, pace: float) -> None:
        """Set the speed of downloads in bytes per second; 0 = no limit."""
        call(f"{self._control}/pace", {"pace": pace})

    def report(self) -> dict[str, Any]:
        """Return what was injected since the plan came; see FaultPlan.report."""
        found: dict[str, Any] = call(f"{self._control}/report")
        return found
