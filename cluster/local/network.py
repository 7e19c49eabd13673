"""A Ray cluster of several machines on one: each node has its own address, ports, processes and shared memory.

    python cluster/local/network.py up --workers 3    # head, workers, MLflow, S3; prints what to export
    python cluster/local/network.py kill worker-1     # SIGKILL for all of it: a lost machine
    python cluster/local/network.py evict worker-1    # SIGTERM, as Kubernetes ends a pod; it has half a minute
    python cluster/local/network.py cut worker-2      # a partition: nothing goes in or out; the head gives it up in 65 s
    python cluster/local/network.py heal worker-2
    python cluster/local/network.py status            # which nodes the head holds to be alive
    python cluster/local/network.py down

A node is a network and process namespace on a bridge, which takes Linux and root. It gets what the manifests in
cluster/kubernetes give a pod of the overlay dev, and nothing else of this shell: the environment, ports, labels, the
command line, the cluster's token; and the packets that the network policies let through, where this machine stands for
MLflow, for SeaweedFS and for a submitter of jobs. Different from a pod: processes are root, and the object store is small.

The run folder is `network` in CIR_RUN_DIR (.run); token and keys are there, readable for their owner alone.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from network_policies import let_through
from processes import (
    BIN,
    ROOT,
    Record,
    StartError,
    alive,
    finish_start,
    kill_now,
    load_state,
    locked,
    run_dir,
    save_state,
    start,
    stop,
)
from ray_nodes import listed
from s3_server import load_server, start_s3

NETWORK = ipaddress.ip_network("10.231.7.0/24")
GCS, DASHBOARD, METRICS, AGENT, MLFLOW = 6379, 8265, 8080, 52365, 5000  # as in the manifests
_SERVICES = ("mlflow", "s3")  # what runs beside the nodes, on this machine's address
_MANIFESTS = ROOT / "cluster" / "kubernetes" / "base"
_DEV = ROOT / "cluster" / "kubernetes" / "overlays" / "dev"
_BRIDGE = "cir-br"
HERE = str(NETWORK[1])  # this machine, on the bridge
_HEAD = str(NETWORK[10])
URL = f"http://{_HEAD}:{DASHBOARD}"
_OBJECT_STORE_BYTES = 300_000_000
_MOST_WORKERS = 200
_NODES = f"{_HEAD}-{NETWORK[10 + _MOST_WORKERS]}"
_IS_NODE = ("ray.io/is-ray-node", "yes")
# Whom a podSelector of the network policies means here, as a range of addresses.
_WHO = {
    _IS_NODE: _NODES,
    ("ray.io/node-type", "head"): f"{_HEAD}-{_HEAD}",
    ("app.kubernetes.io/name", "mlflow"): f"{HERE}-{HERE}",
    ("app.kubernetes.io/name", "seaweedfs"): f"{HERE}-{HERE}",
    ("slerp-tat/role", "submitter"): f"{HERE}-{HERE}",
}
# What a container has of its own. The arguments are the command.
_IN_NODE = 'mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && mount -t tmpfs tmpfs /dev/shm && exec "$@"'


def _do(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode:
        raise StartError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done


def _namespace(name: str) -> str:
    return f"cir-{name}"


def _in(name: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return _do("ip", "netns", "exec", _namespace(name), *command, check=check)


def _address(name: str) -> str:
    """Return the address of "head" or "worker-N"."""
    return _HEAD if name == "head" else str(NETWORK[10 + int(name.rpartition("-")[2])])


def _plug_in(name: str) -> None:
    """Make a node's network: an address on the bridge, and the packets that the network policies let through."""
    _pull_out(name)
    outer = f"cir-{_address(name).rpartition('.')[2]}"
    _do("ip", "netns", "add", _namespace(name))
    _do("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", _namespace(name))
    _do("ip", "link", "set", outer, "master", _BRIDGE, "up")
    _in(name, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", check=False)  # the rules below are of IPv4
    _in(name, "ip", "link", "set", "lo", "up")
    _in(name, "ip", "address", "add", f"{_address(name)}/{NETWORK.prefixlen}", "dev", "eth0")
    _in(name, "ip", "link", "set", "eth0", "up")
    for chain, interface in (("INPUT", "-i"), ("OUTPUT", "-o")):
        _in(name, "iptables", "-P", chain, "DROP")
        _in(name, "iptables", "-A", chain, interface, "lo", "-j", "ACCEPT")
        _in(name, "iptables", "-A", chain, "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
    labels = dict([_IS_NODE, ("ray.io/node-type", "head" if name == "head" else "worker")])
    for way in let_through(labels, network_policies(), _WHO):
        chain, which = ("INPUT", "--src-range") if way.incoming else ("OUTPUT", "--dst-range")
        port = ("-p", way.protocol.lower(), "--dport", str(way.port)) if way.port else ()
        _in(name, "iptables", "-A", chain, "-m", "iprange", which, way.addresses, *port, "-j", "ACCEPT")


def _pull_out(name: str) -> None:
    _do("ip", "netns", "delete", _namespace(name), check=False)  # its end of the cable goes with it
    _do("ip", "link", "delete", f"cir-{_address(name).rpartition('.')[2]}", check=False)


def network_policies() -> list[dict[str, Any]]:
    """Return the network policies of the overlay dev."""
    files = (_MANIFESTS / "network_policies.yaml", _DEV / "seaweedfs.yaml")
    found = (document for file in files for document in yaml.safe_load_all(file.read_text()))
    return [document for document in found if document["kind"] == "NetworkPolicy"]


def pod_environment(secret: Mapping[str, str], token: str) -> dict[str, str]:
    """Return the variables that a container gets in the overlay dev and by KubeRay, with this machine's MLflow and S3.

    secret: what Secret s3 holds, and where its server is.
    """
    found: dict[str, str] = {}
    for file in (_MANIFESTS / "settings.yaml", _DEV / "settings_patch.yaml", _DEV / "storage_patch.yaml"):
        for document in yaml.safe_load_all(file.read_text()):
            found |= document["data"]
    found["MLFLOW_TRACKING_URI"] = f"http://{HERE}:{MLFLOW}"
    return found | dict(secret) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def pod_arguments(group: str, num_cpus: float) -> list[str]:
    """Return the arguments of `ray start` of a group of the RayCluster ("head", "decode"), as KubeRay makes them."""
    spec = yaml.safe_load((_MANIFESTS / "raycluster" / "raycluster.yaml").read_text())["spec"]
    if group == "head":
        found = spec["headGroupSpec"]
    else:
        (found,) = (item for item in spec["workerGroupSpecs"] if item["groupName"] == group)
    parameters = {"num-cpus": f"{num_cpus:g}", **found["rayStartParams"]}
    parameters |= {"object-store-memory": str(_OBJECT_STORE_BYTES), "metrics-export-port": str(METRICS)}
    parameters["dashboard-agent-listen-port"] = str(AGENT)
    if found.get("labels"):
        parameters["labels"] = ",".join(f"{key}={value}" for key, value in found["labels"].items())
    return [f"--{key}={value}" for key, value in parameters.items()]


def start_node(
    state: dict[str, Record], name: str, environment: Mapping[str, str], num_cpus: float, *more: str
) -> None:
    """Start "head" or "worker-N", wait until the head lists it, record it in `state`. more: arguments for `ray start`."""
    _plug_in(name)
    address = _address(name)
    if name == "head":
        own = ["--head", f"--port={GCS}", "--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD}"]
        variables = {**environment, "RAY_ADDRESS": f"127.0.0.1:{GCS}"}
    else:
        own, variables = [f"--address={_HEAD}:{GCS}"], {**environment, "RAY_ADDRESS": f"{_HEAD}:{GCS}"}
    group = "head" if name == "head" else "decode"
    ray = [
        str(BIN / "ray"),
        "start",
        "--block",
        f"--node-ip-address={address}",
        *own,
        *pod_arguments(group, num_cpus),
        *more,
    ]
    command = [
        "ip", "netns", "exec", _namespace(name),
        "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
        "sh", "-c", _IN_NODE, "node", "bash", "-c", "--", f"ulimit -n 65536; {shlex.join(ray)} ",  # as KubeRay does
    ]  # fmt: skip
    nothing_else: dict[str, str | None] = dict.fromkeys(os.environ)
    try:
        start(state, name, command, {**nothing_else, **variables}, {"url": URL, "kill": True}, ready=URL)
        finish_start(state, name, lambda: address in alive_addresses())
    except BaseException:
        _pull_out(name)  # it is not recorded, so `down` would not
        raise


def _start_mlflow(state: dict[str, Record]) -> None:
    home = run_dir() / "mlflow"
    home.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", HERE, "--port", str(MLFLOW), "--workers", "1",
        "--allowed-hosts", f"{HERE}:{MLFLOW}",
        "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--artifacts-destination", str(home / "artifacts"),
    ]  # fmt: skip
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    url = f"http://{HERE}:{MLFLOW}"
    start(state, "mlflow", command, environment, {"url": url}, ready=f"{url}/health")
    finish_start(state, "mlflow")


def alive_addresses() -> set[str]:
    """Return the addresses of the nodes that the head holds to be alive; none while it does not answer."""
    token = token_file().read_text() if token_file().exists() else ""
    return {node["node_ip"] for node in listed(URL, token=token)}


def token_file() -> Path:
    """Return where the cluster's token is."""
    return run_dir() / "token"


def _token() -> str:
    path = token_file()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    return path.read_text()


def start_around(state: dict[str, Record]) -> dict[str, str]:
    """Make the bridge and start MLflow and S3, if they are not there; return the environment of nodes."""
    if _do("ip", "link", "show", _BRIDGE, check=False).returncode:
        _do("ip", "link", "add", _BRIDGE, "type", "bridge")
        _do("ip", "address", "add", f"{HERE}/{NETWORK.prefixlen}", "dev", _BRIDGE)
        _do("ip", "link", "set", _BRIDGE, "up")
    if "mlflow" not in state:
        print("starting the MLflow server", flush=True)
        _start_mlflow(state)
    if "s3" not in state:
        print("starting the S3 server", flush=True)
        start_s3(state, HERE)
    return pod_environment(load_server(HERE).environment(), _token())


def up(*, workers: int, num_cpus: float) -> dict[str, Record]:
    """Start what is not running: the bridge, MLflow, the head, workers; return the record of them."""
    with locked():
        state = load_state()
        joined = alive_addresses()
        for name, record in list(state.items()):  # also nodes that were cut off, and all of them without a head
            if alive(record) is None or (name not in _SERVICES and _address(name) not in joined):
                _forget(state, name)
        environment = start_around(state)
        for name in ["head", *(f"worker-{number}" for number in range(1, workers + 1))]:
            if name not in state:
                print(f"starting {name} at {_address(name)}", flush=True)
                start_node(state, name, environment, num_cpus)
        return state


def _forget(state: dict[str, Record], name: str) -> None:
    stop(name, state.pop(name))
    if name not in _SERVICES:
        _pull_out(name)
    save_state(state)


def down() -> None:
    """Stop everything, the workers first, and take the network away. The bucket and MLflow's data stay."""
    with locked():
        state = load_state()
        for name in reversed(list(state)):
            _forget(state, name)
        _do("ip", "link", "delete", _BRIDGE, check=False)
        token_file().unlink(missing_ok=True)


def kill(name: str) -> None:
    """End every process of a node at once, as when its machine is lost."""
    print(f"killed {kill_now(_known(name))} processes of {name}", flush=True)


def evict(name: str) -> None:
    """End a node as Kubernetes ends a pod: its first process gets SIGTERM. Ray tells the cluster, and goes later."""
    leader = alive(_known(name))
    inside = leader.children() if leader else []  # of `unshare`: the first process of the node's own namespace
    if not inside:
        raise StartError(f"{name} has ended; `network.py up` replaces it")
    inside[0].terminate()


def cut(name: str) -> None:
    """Let no packet in or out of a node; its processes live on and know nothing."""
    _wall(name, "-I")


def heal(name: str) -> None:
    """Undo `cut`."""
    _wall(name, "-D")


def _wall(name: str, change: str) -> None:
    """Put a rule before the others that drops every packet (-I), or take it away (-D); once is enough."""
    _known(name)
    for chain, way in (("INPUT", "-i"), ("OUTPUT", "-o")):
        rule = (chain, way, "eth0", "-j", "DROP")
        stands = _in(name, "iptables", "-C", *rule, check=False).returncode == 0
        if stands == (change == "-D"):
            _in(name, "iptables", change, *rule)


def _known(name: str) -> Record:
    state = load_state()
    if name not in state or name in _SERVICES:
        nodes = ", ".join(item for item in state if item not in _SERVICES) or "none; `network.py up` starts some"
        raise StartError(f"{name} is no node; running: {nodes}")
    return state[name]


def _check_machine() -> None:
    missing = [tool for tool in ("ip", "iptables", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        raise StartError(f"not installed: {', '.join(missing)} (Debian: iproute2, iptables, util-linux, mount)")
    if os.geteuid() != 0:
        raise StartError("namespaces and a bridge take root: sudo, or a container with --privileged")


def main() -> int:
    """Run one command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("up")
    starting.add_argument("--workers", type=int, default=3)
    starting.add_argument("--num-cpus", type=float, default=2, help="logical CPUs of each worker")
    for name in ("kill", "evict", "cut", "heal"):
        commands.add_parser(name).add_argument("node")
    commands.add_parser("status")
    commands.add_parser("down")
    options: Any = parser.parse_args()
    os.environ["CIR_RUN_DIR"] = str(run_dir() / "network")
    try:
        _check_machine()
        if options.command == "up":
            if not 1 <= options.workers <= _MOST_WORKERS or options.num_cpus <= 0:
                raise StartError(f"--workers must be from 1 to {_MOST_WORKERS}, --num-cpus above 0")
            up(workers=options.workers, num_cpus=options.num_cpus)
            print(f"MLflow  http://{HERE}:{MLFLOW}")
            print(f"S3      {load_server(HERE).endpoint}, bucket s3://cir, which the nodes see")
            print(f"export RAY_API_SERVER_ADDRESS={URL} RAY_AUTH_MODE=token")
            print(f'export RAY_AUTH_TOKEN="$(cat {token_file()})"')
        elif options.command == "down":
            down()
        elif options.command == "status":
            nodes, joined = [name for name in load_state() if name not in _SERVICES], alive_addresses()
            for name in nodes:
                print(name, _address(name), "alive" if _address(name) in joined else "not alive")
            if not nodes:
                print("no node is running; `network.py up` starts some")
        else:
            {"kill": kill, "evict": evict, "cut": cut, "heal": heal}[options.command](options.node)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
