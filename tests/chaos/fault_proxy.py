"""The fault proxy as a recorded server (see cluster/local/processes.py), and its control address."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import HOST, Record, finish_start, free_port, start

_SCRIPT = Path(__file__).with_name("proxy.py")


@dataclass(frozen=True)
class FaultProxy:
    """A running proxy. url: what clients use as AWS_ENDPOINT_URL."""

    url: str
    control: str

    def plan(self, faults: Mapping[str, int], *, rate: float, seed: int, pace: float = 0) -> None:
        """Set what is injected from now on, and begin to count anew; see proxy.py."""
        self._call("plan", {"faults": dict(faults), "rate": rate, "seed": seed, "pace": pace})

    def set_pace(self, pace: float) -> None:
        """Set the speed of downloads in bytes per second; 0 = no limit."""
        self._call("pace", {"pace": pace})

    def report(self) -> dict[str, Any]:
        """Return what was injected since the plan came: counts, left, requests, done, downloaded, uploads."""
        found: dict[str, Any] = json.loads(self._call("report"))
        return found

    def _call(self, path: str, value: Any = None) -> bytes:
        data = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(f"{self.control}/{path}", data, {"Content-Type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310 - our own http:// address
            body: bytes = reply.read()
        return body


def start_proxy(state: dict[str, Record], upstream: str) -> FaultProxy:
    """Start the proxy in front of an S3 server, wait until it answers, record it in `state` as "proxy"."""
    port, control = free_port("proxy"), free_port("proxy control")
    command = [sys.executable, str(_SCRIPT), "--upstream", upstream, "--port", str(port)]
    command += ["--control_port", str(control)]
    proxy = FaultProxy(f"http://{HOST}:{port}", f"http://{HOST}:{control}")
    start(state, "proxy", command, {}, {"url": proxy.url}, ready=f"{proxy.control}/report")
    finish_start(state, "proxy")
    return proxy
