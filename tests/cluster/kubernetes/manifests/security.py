"""How pods are locked down: Kubernetes' "restricted" standard and what we ask beyond it, KubeRay's own containers included."""

from __future__ import annotations

import re
from typing import Any

from manifests.kuberay_rules import Rule
from manifests.render import Object, key
from manifests.workloads import clusters, of_kind, pods

_API_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"  # noqa: S105 - a folder
_SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_IMAGE = re.compile(r"[\w./-]+(:[\w.-]+|@sha256:[0-9a-f]{64})")


def containers_are_locked_down(objects: list[Object]) -> list[str]:
    """No root, no new privileges, no capabilities, a read-only root; RuntimeDefault for the pod's system calls."""
    found = []
    for pod in pods(objects):
        whole = pod.spec.get("securityContext", {})
        if whole.get("seccompProfile") != {"type": "RuntimeDefault"} or not whole.get("runAsUser"):
            found.append(f"{pod.name}: securityContext of the pod {whole}")
        for one in pod.containers:
            own = one.get("securityContext", {})
            expected = {
                "runAsNonRoot": True,
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            if own != expected:
                found.append(f"{pod.name} {one['name']}: securityContext {own}")
    return found


def pods_share_nothing_with_their_machine(objects: list[Object]) -> list[str]:
    """No host network, processes, ports or paths; no links to services as variables."""
    found = []
    for pod in pods(objects):
        wrong = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(name)]
        wrong += [volume["name"] for volume in pod.spec.get("volumes", []) if "hostPath" in volume]
        wrong += [one["name"] for one in pod.containers for port in one.get("ports", []) if "hostPort" in port]
        wrong += [] if pod.spec.get("enableServiceLinks") is False else ["enableServiceLinks"]
        found += [f"{pod.name}: {', '.join(wrong)}"] if wrong else []
    return found


def only_the_autoscaler_has_a_token(objects: list[Object]) -> list[str]:
    """A token for the Kubernetes API is mounted into the autoscaler's container and nowhere else."""
    found = []
    for pod in pods(objects):
        if pod.spec.get("automountServiceAccountToken") is not False:
            found.append(f"{pod.name}: automountServiceAccountToken")
        volumes = pod.spec.get("volumes", [])
        tokens = {volume["name"] for volume in volumes if "serviceAccountToken" in str(volume.get("projected", ""))}
        for one in pod.containers:
            mounts = {mount["name"]: mount["mountPath"] for mount in one.get("volumeMounts", [])}
            has, needs = bool(tokens & set(mounts)), one["name"] == "autoscaler"
            if has != needs or (needs and _API_TOKEN not in mounts.values()):
                found.append(f"{pod.name} {one['name']}: {'has' if has else 'lacks'} a token for the Kubernetes API")
    for account in of_kind(objects, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            found.append(f"{' '.join(key(account))}: automountServiceAccountToken")
    return found


def no_secret_is_written_down(objects: list[Object]) -> list[str]:
    """Secrets are named, never contained: no Secret object, no value of a variable that is called like one, none in a URI."""
    found = [f"{' '.join(key(one))}: a Secret among the manifests" for one in of_kind(objects, "Secret")]
    for one in of_kind(objects, "ConfigMap"):
        found += [f"{' '.join(key(one))}: {name}" for name in one.get("data", {}) if _SECRET.search(name)]
    for pod in pods(objects):
        for container in pod.containers:
            for item in container.get("env", []):
                if "value" in item and _SECRET.search(item["name"]):
                    found.append(f"{pod.name} {container['name']}: the value of {item['name']}")
    found += [
        f"{' '.join(key(one))}: {text}"
        for one in objects
        for text in _texts(one)
        if re.search(r"://[^/\s]*:[^/\s]*@", text)
    ]
    return found


def _texts(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [text for child in children for text in _texts(child)]


def images_are_fixed(objects: list[Object]) -> list[str]:
    """A version or a digest; "latest" is neither."""
    return [
        f"{pod.name} {one['name']}: image {one['image']}"
        for pod in pods(objects)
        for one in pod.containers
        if not _IMAGE.fullmatch(one["image"]) or one["image"].endswith(":latest")
    ]


def clusters_ask_for_a_token(objects: list[Object]) -> list[str]:
    """Ray's own authentication is on, and no variable switches it off."""
    found = [
        f"{' '.join(key(one))}: authOptions {cluster.get('authOptions')}"
        for one, cluster in clusters(objects)
        if cluster.get("authOptions", {}).get("mode") != "token"
    ]
    settings = [
        name for one in of_kind(objects, "ConfigMap") for name in one.get("data", {}) if name.startswith("RAY_AUTH")
    ]
    own = [item["name"] for pod in pods(objects) for one in pod.containers for item in one.get("env", [])]
    return found + [
        f"{name}: the operator sets it" for name in settings + [name for name in own if name == "RAY_AUTH_MODE"]
    ]


def nothing_is_exposed(objects: list[Object]) -> list[str]:
    """Services are ClusterIP, heads make no Ingress, and there is none."""
    found = [
        f"{' '.join(key(one))}: an Ingress" for one in objects if one["kind"] in ("Ingress", "HTTPRoute", "Gateway")
    ]
    found += [
        f"{' '.join(key(one))}: {one['spec']['type']}"
        for one in of_kind(objects, "Service")
        if one["spec"].get("type", "ClusterIP") != "ClusterIP"
    ]
    for one, cluster in clusters(objects):
        head = cluster["headGroupSpec"]
        if head.get("enableIngress") or head.get("serviceType", "ClusterIP") != "ClusterIP":
            found.append(f"{' '.join(key(one))}: the head is exposed")
    return found


def the_namespace_is_restricted(objects: list[Object]) -> list[str]:
    """The API server checks each pod again."""
    return [
        f"{' '.join(key(one))}: pod-security.kubernetes.io/enforce"
        for one in of_kind(objects, "Namespace")
        if one["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted"
    ]


RULES: tuple[Rule, ...] = (
    containers_are_locked_down, pods_share_nothing_with_their_machine, only_the_autoscaler_has_a_token,
    no_secret_is_written_down, images_are_fixed, clusters_ask_for_a_token, nothing_is_exposed, the_namespace_is_restricted,
)  # fmt: skip
