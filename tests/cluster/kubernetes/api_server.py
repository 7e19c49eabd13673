"""A Kubernetes API server on loopback, with its scheduler and controllers where they are; no kubelet: no pod runs.

KUBEBUILDER_ASSETS is the folder of the programs, as for envtest: kube-apiserver and etcd, which `setup-envtest use -p path`
downloads, and beside them kube-scheduler and kube-controller-manager. build_api_server.sh makes all four on Debian.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from manifests.render import Object

_SERVER = ("etcd", "kube-apiserver")
_CONTROLLERS = ("kube-scheduler", "kube-controller-manager")
CLUSTER_WIDE = ("Namespace", "Node", "PriorityClass", "ClusterQueue", "ResourceFlavor", "CustomResourceDefinition")
_OURS = {  # kinds that are no part of Kubernetes; their schemas are looked at elsewhere
    ("ray.io", "v1"): ("RayCluster", "RayJob"),
    ("kueue.x-k8s.io", "v1beta2"): ("LocalQueue", "ClusterQueue", "ResourceFlavor"),
    ("monitoring.coreos.com", "v1"): ("PodMonitor", "PrometheusRule"),
}


def programs() -> dict[str, Path]:
    """Return where the programs are: none, the server's, or the controllers' too."""
    folder = Path(os.environ.get("KUBEBUILDER_ASSETS") or "/usr/local/kubebuilder/bin")
    sets = (names for names in (_SERVER, _CONTROLLERS) if all((folder / name).exists() for name in names))
    found = {name: folder / name for names in sets for name in names}
    return found if found.keys() >= set(_SERVER) else {}


def has_controllers() -> bool:
    """Whether there are a scheduler and controllers to start."""
    return programs().keys() >= set(_CONTROLLERS)


class RefusedError(Exception):
    """What the API server answered; status: its HTTP status."""

    def __init__(self, reply: requests.Response) -> None:
        super().__init__(f"{reply.status_code}: {reply.json().get('message', reply.text)}")
        self.status = reply.status_code


class ApiServer:
    """Requests as an administrator."""

    def __init__(self, url: str, token: str, certificate: Path) -> None:
        self._url, self._session = url, requests.Session()
        self._session.headers["Authorization"] = f"Bearer {token}"
        self._session.trust_env = False  # REQUESTS_CA_BUNDLE would come before this certificate
        self._session.verify = str(certificate)
        self._plurals: dict[tuple[str, str], str] = {}

    def call(self, method: str, path: str, body: Object | None = None, **query: str) -> Object:
        """Send a request; returns the answer. Raises RefusedError."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        reply = self._session.request(
            method, self._url + path, json=body, params=query, headers={"Content-Type": kind}, timeout=30
        )
        if not reply.ok:
            raise RefusedError(reply)
        found: Object = reply.json()
        return found

    def minor(self) -> int:
        """Return N of the server's version 1.N."""
        return int(re.sub(r"\D", "", self.call("GET", "/version")["minor"]))

    def path(self, one: Object, *more: str) -> str:
        """Return the path of an object's kind in its namespace; more: its name, a subresource."""
        version, kind = one["apiVersion"], one["kind"]
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        if (version, kind) not in self._plurals:
            for found in self.call("GET", root)["resources"]:
                if "/" not in found["name"]:
                    self._plurals[version, found["kind"]] = found["name"]
        place = "" if kind in CLUSTER_WIDE else f"/namespaces/{one['metadata'].get('namespace', 'default')}"
        return "/".join([root + place, self._plurals[version, kind], *more])

    def create(self, one: Object, **query: str) -> Object:
        """Create an object; one that a version of Kubernetes before 1.21 knows by another name, by that."""
        if one["kind"] == "PodDisruptionBudget" and self.minor() < 21:
            one = {**one, "apiVersion": "policy/v1beta1"}
        return self.call("POST", self.path(one), one, **query)

    def get(self, one: Object) -> Object:
        """Return an object as it is now."""
        return self.call("GET", self.path(one, one["metadata"]["name"]))


def custom_kinds() -> Iterator[Object]:
    """Yield CustomResourceDefinitions that take whatever is in an object of these kinds."""
    for (group, version), kinds in _OURS.items():
        for kind in kinds:
            plural = f"{kind.lower()}s"
            schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
            yield {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": f"{plural}.{group}"},
                "spec": {
                    "group": group,
                    "scope": "Cluster" if kind in CLUSTER_WIDE else "Namespaced",
                    "names": {"kind": kind, "plural": plural},
                    "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
                },
            }


def until(ask: Callable[[], Any], *, seconds: float = 60) -> Any:
    """Ask until the answer is true; return it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = ask()
        except (OSError, RefusedError):
            found = None
        if found:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextmanager
def running(folder: Path) -> Iterator[ApiServer]:
    """Start the programs with their files in `folder`; stop them at the end."""
    clients, peers, port = _ports(3)
    store, url, token = f"http://127.0.0.1:{clients}", f"https://127.0.0.1:{port}", secrets.token_hex(32)
    key, tokens, config = folder / "service-accounts.pem", folder / "tokens.csv", folder / "kubeconfig"
    secret = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    formats = (serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    for path, text in ((key, secret.private_bytes(*formats).decode()), (tokens, f"{token},admin,1,system:masters\n")):
        path.touch(0o600)
        path.write_text(text)
    certificate = folder / "certs" / "apiserver.crt"
    access = {
        "clusters": [{"name": "it", "cluster": {"server": url, "certificate-authority": str(certificate)}}],
        "users": [{"name": "it", "user": {"token": token}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
    }
    config.touch(0o600)
    config.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "it", **access}))
    client = f"--kubeconfig={config}"
    commands = {
        "etcd": [f"--data-dir={folder / 'etcd'}", f"--listen-client-urls={store}", f"--advertise-client-urls={store}",
                 f"--listen-peer-urls=http://127.0.0.1:{peers}"],
        "kube-apiserver": [f"--etcd-servers={store}", "--bind-address=127.0.0.1", "--advertise-address=10.0.0.1",
                           f"--secure-port={port}", f"--cert-dir={folder / 'certs'}", f"--token-auth-file={tokens}",
                           "--authorization-mode=RBAC", f"--service-account-key-file={key}",
                           f"--service-account-signing-key-file={key}", "--service-account-issuer=https://kubernetes.default.svc"],
        "kube-scheduler": [client, "--leader-elect=false", "--bind-address=127.0.0.1"],
        "kube-controller-manager": [client, "--leader-elect=false", "--bind-address=127.0.0.1",
                                    f"--service-account-private-key-file={key}"],
    }  # fmt: skip
    server = ApiServer(url, token, certificate)
    with ExitStack() as stack:
        for name, program in programs().items():
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen([program, *commands[name]], stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            if name == "kube-apiserver":
                until(certificate.exists)
                until(partial(server.call, "GET", "/api/v1/namespaces/kube-system"))
        yield server


def fake_node(name: str, capacity: dict[str, str], labels: Iterable[str] = (), taints: Iterable[str] = ()) -> Object:
    """Return a Node without a machine. labels: "key=value"; taints: keys, of effect NoSchedule."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **dict(text.split("=") for text in labels)}},
        "spec": {"taints": [{"key": key, "value": "true", "effect": "NoSchedule"} for key in taints]},
        "status": {"capacity": capacity, "allocatable": capacity,
                   "conditions": [{"type": "Ready", "status": "True", "reason": "Fake"}]},
    }  # fmt: skip
