"""The local Ray head, and further nodes of it on this machine: raylets of their own that can be killed one by one.

    python cluster/local/cluster.py node --num-cpus 1 --resources '{"second": 1}' --labels zone=b

A node is a session of its own in cluster.json (node-1, node-2, ...), so that `down` stops it. From a program:

    name = start_node(state, num_cpus=1, resources={"second": 1})   # returns when the head lists it as alive
    kill_now(state[name])    # SIGKILL for raylet, agent and workers: a lost machine; the head notices in about 15 s
    stop(name, state.pop(name))
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
import sys
import urllib.request
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from processes import BIN, HOST, Record, StartError, finish_start, free_port, run_dir, start

_JOIN = Path(__file__).with_name("join_head.py")
_NODE_LABEL = "cir-node"  # which of our nodes it is, so that the head's list tells when it has joined
_OBJECT_STORE_BYTES = 1_000_000_000


def _environment() -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ADDRESS": "",
        # Without this, Ray on Linux replaces 127.0.0.1 by the machine's address and listens on all of them.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_DATA_USE_DATASOURCE_V2": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
    }


def start_head(state: dict[str, Record], extra_env: Mapping[str, str | None], about: Record) -> None:
    """Start a Ray head with dashboard and Jobs API; on a loaded machine that can fail, so up to three times.

    Args:
        state: the record of all servers; the head becomes "ray".
        extra_env: variables that every job and worker shall have.
        about: goes into the record.
    """
    for attempt in range(3):
        gcs, dashboard = free_port("gcs"), free_port("dashboard")
        command = [
            str(BIN / "ray"), "start", "--head", "--block", f"--node-ip-address={HOST}", f"--port={gcs}",
            f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}", "--include-dashboard=true",
            # Both are fixed otherwise, and a second head on the machine fails or submits its jobs to the first.
            f"--ray-client-server-port={free_port('ray client')}", "--dashboard-agent-listen-port=0",
            f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats",
        ]  # fmt: skip
        # A folder of its own, short because sockets live in it. In Ray's default folder the head would become the
        # machine's current cluster, which a bare `ray job submit` looks up by an address that nothing listens on here.
        folder = hashlib.sha256(str(run_dir()).encode()).hexdigest()[:8]
        parent = os.environ.get("RAY_TMPDIR", "/tmp")  # noqa: S108 - Ray's own default; tempfile's may be too long
        command.append(f"--temp-dir={parent}/ray-{folder}")
        url = f"http://{HOST}:{dashboard}"
        # To SIGTERM it answers by waiting half a minute for tasks, which end with it whatever it waits for.
        found = {"url": url, "address": f"{HOST}:{gcs}", "kill": True, **about}
        try:
            start(state, "ray", command, {**_environment(), **extra_env}, found, ready=f"{url}/api/version")
            # The dashboard answers before the head's own node has joined, and Ray may still give up.
            finish_start(state, "ray", partial(_has_joined, url))
        except StartError:
            if attempt == 2:
                raise
            print("Ray did not start, trying again", flush=True)
        else:
            return


def start_node(
    state: dict[str, Record],
    *,
    num_cpus: float = 1,
    resources: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
    extra_env: Mapping[str, str | None] | None = None,
) -> str:
    """Start one more raylet that joins the recorded head, wait until it is alive there, return its name.

    Args:
        state: the record of all servers; the node is added as "node-1" or the next free number.
        num_cpus: logical CPUs of the node.
        resources: custom resources, e.g. {"second": 1}, to place actors on it.
        labels: node labels for label selectors.
        extra_env: variables for its workers; the head's own do not reach them.

    Raises:
        StartError: no head is recorded, or the node did not join it.
    """
    if "ray" not in state:
        raise StartError("there is no Ray head to join; `make up` starts one")
    head = state["ray"]
    name = next(name for name in (f"node-{number}" for number in range(1, 1000)) if name not in state)
    own = {**(labels or {}), _NODE_LABEL: f"{name}-{secrets.token_hex(4)}"}  # a killed node stays listed for a while
    command = [
        sys.executable, str(_JOIN), "start", f"--address={head['address']}", "--block", f"--node-ip-address={HOST}",
        f"--num-cpus={num_cpus:g}", f"--resources={json.dumps(dict(resources or {}))}",
        f"--labels={','.join(f'{key}={value}' for key, value in own.items())}",
        # The head has the fixed ones and the default range of worker ports.
        "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0",
        f"--object-store-memory={_OBJECT_STORE_BYTES // 5}", "--disable-usage-stats",
    ]  # fmt: skip
    about = {"head": head["pid"], "label": own[_NODE_LABEL], "kill": True}
    start(state, name, command, {**_environment(), **(extra_env or {})}, about, ready=f"{head['url']}/api/version")
    finish_start(state, name, lambda: own[_NODE_LABEL] in alive_nodes(head))
    return name


def alive_nodes(head: Mapping[str, Any]) -> set[str]:
    """Return the labels (record "label") of the nodes started here that the head holds to be alive."""
    return {node["labels"][_NODE_LABEL] for node in listed(head["url"]) if _NODE_LABEL in (node["labels"] or {})}


def _has_joined(dashboard: str) -> bool:
    return bool(listed(dashboard))


def listed(dashboard: str, kind: str = "nodes", *, token: str = "") -> list[Record]:
    """Return what the head holds to be alive, "nodes" or "actors"; nothing while it does not answer."""
    query = "limit=1000&detail=1&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{dashboard}/api/v0/{kind}?{query}", headers=headers)  # noqa: S310 - our own http://
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310
            return list(json.loads(reply.read())["data"]["result"]["result"])
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return []
