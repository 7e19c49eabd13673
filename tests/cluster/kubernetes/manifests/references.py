"""Whether what objects name is there: Secrets, ConfigMaps, claims, volumes, accounts, ports, selectors, classes, queues."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from manifests.kuberay_rules import Rule
from manifests.render import Object, key
from manifests.workloads import Pod, of_kind, pods, selects

README = Path(__file__).resolve().parents[4] / "cluster" / "kubernetes" / "README.md"
_OF_EVERY_NAMESPACE = {"kube-root-ca.crt"}
QUEUE = "kueue.x-k8s.io/queue-name"


def documented_secrets() -> dict[str, set[str]]:
    """Return the Secrets that README.md tells people to make, with their keys: rows "| Secret `name` | `key`, ... |"."""
    rows = re.findall(r"^\| Secret `([\w-]+)` \| ([^|]+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: set(re.findall(r"`([^`]+)`", keys)) for name, keys in rows}


def _names(objects: list[Object], kind: str) -> set[str]:
    return {one["metadata"]["name"] for one in of_kind(objects, kind)}


def secret_references(pod: Pod) -> Iterator[tuple[str, str]]:
    """Yield (Secret, key) for all that a pod takes; "" for the whole of it."""
    for container in pod.containers:
        for item in container.get("env", []):
            if reference := item.get("valueFrom", {}).get("secretKeyRef"):
                yield reference["name"], reference["key"]
        for item in container.get("envFrom", []):
            if "secretRef" in item:
                yield item["secretRef"]["name"], ""
    for volume in pod.spec.get("volumes", []):
        if secret := volume.get("secret"):
            for item in secret.get("items", [{"key": ""}]):
                yield secret["secretName"], item["key"]


def secrets_are_documented(objects: list[Object]) -> list[str]:
    """Each Secret and key stands in README.md's table, since no manifest makes it."""
    known = documented_secrets()
    return [
        f"{pod.name}: Secret {name} {field}"
        for pod in pods(objects)
        for name, field in secret_references(pod)
        if name not in known or (field and field not in known[name])
    ]


def _config_maps(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for name in ("configMapRef", "configMapKeyRef", "configMap"):
            if name in node:
                yield node[name]["name"]
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _config_maps(child)


def config_maps_exist(objects: list[Object]) -> list[str]:
    """ConfigMaps of environments and volumes."""
    known = _names(objects, "ConfigMap") | _OF_EVERY_NAMESPACE
    return [
        f"{pod.name}: ConfigMap {name}" for pod in pods(objects) for name in _config_maps(pod.spec) if name not in known
    ]


def volumes_are_there_and_used(objects: list[Object]) -> list[str]:
    """Each mount has its volume, each volume a mount and, if it is a claim, the claim; no two at one place."""
    claims, found = _names(objects, "PersistentVolumeClaim"), []
    for pod in pods(objects):
        volumes = [volume["name"] for volume in pod.spec.get("volumes", [])]
        mounts = [mount["name"] for one in pod.containers for mount in one.get("volumeMounts", [])]
        found += [f"{pod.name}: volume {name}" for name in set(volumes) ^ set(mounts)]
        for one in pod.containers:
            places = [mount["mountPath"] for mount in one.get("volumeMounts", [])]
            found += [f"{pod.name} {one['name']}: mounts {places}"] if len(set(places)) < len(places) else []
        for volume in pod.spec.get("volumes", []):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            found += [f"{pod.name}: claim {claim}"] if claim and claim not in claims else []
    return found


def accounts_and_classes_exist(objects: list[Object]) -> list[str]:
    """Each pod names a service account and a priority class of these manifests."""
    accounts, classes = _names(objects, "ServiceAccount"), _names(objects, "PriorityClass")
    return [
        f"{pod.name}: {field} {pod.spec.get(field)}"
        for pod in pods(objects)
        for field, known in (("serviceAccountName", accounts), ("priorityClassName", classes))
        if pod.spec.get(field) not in known
    ]


def probes_have_their_port(objects: list[Object]) -> list[str]:
    """Each pod but a submitter is probed three ways, on a port that its container names."""
    found = []
    for pod in pods(objects):
        ports = {port["name"] for port in pod.main.get("ports", [])}
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            port = pod.main.get(name, {}).get("httpGet", {}).get("port")
            if port not in ports and pod.group != "submitter":
                found.append(f"{pod.name}: {name} on {port}")
    return found


def services_lead_somewhere(objects: list[Object]) -> list[str]:
    """Each Service selects pods that name its target ports."""
    found = []
    for one in of_kind(objects, "Service"):
        behind = [pod for pod in pods(objects) if selects({"matchLabels": one["spec"]["selector"]}, pod.labels)]
        for port in one["spec"]["ports"]:
            named = [pod for pod in behind if port["targetPort"] in {item["name"] for item in pod.main["ports"]}]
            if not behind or named != behind:
                found.append(f"{' '.join(key(one))}: port {port['name']}")
    return found


def addresses_are_services(objects: list[Object]) -> list[str]:
    """Each http address in a ConfigMap or variable is a Service and port of these manifests."""
    known = {
        (one["metadata"]["name"], port["port"]) for one in of_kind(objects, "Service") for port in one["spec"]["ports"]
    }
    texts = [str(value) for one in of_kind(objects, "ConfigMap") for value in one.get("data", {}).values()]
    texts += [item.get("value", "") for pod in pods(objects) for item in pod.main.get("env", [])]
    return [
        f"no Service answers at {text}"
        for text in texts
        if re.match(r"https?://\S+$", text) and (urlsplit(text).hostname, urlsplit(text).port) not in known
    ]


def budgets_fit(objects: list[Object]) -> list[str]:
    """Heads and submitters of RayJobs have one PodDisruptionBudget each, and each selects pods; of KubeRay's, minAvailable is a number."""
    found = []
    for one in of_kind(objects, "PodDisruptionBudget"):
        chosen = [pod for pod in pods(objects) if selects(one["spec"]["selector"], pod.labels)]
        of_ray = any("ray.io/cluster" in pod.labels for pod in chosen)
        if not chosen or (of_ray and not isinstance(one["spec"].get("minAvailable"), int)):
            found.append(" ".join(key(one)))
    staying = [pod for pod in pods(of_kind(objects, "RayJob")) if pod.group in ("head", "submitter")]
    kept = [one["spec"]["selector"] for one in of_kind(objects, "PodDisruptionBudget")]
    return found + [
        f"{pod.name}: {sum(selects(selector, pod.labels) for selector in kept)} budgets"
        for pod in staying
        if sum(selects(selector, pod.labels) for selector in kept) != 1
    ]


def queues_exist(objects: list[Object]) -> list[str]:
    """From the label to the LocalQueue, its ClusterQueue, its flavors."""
    found = [
        f"{' '.join(key(one))}: queue {queue}"
        for one in objects
        if (queue := one["metadata"].get("labels", {}).get(QUEUE)) and queue not in _names(objects, "LocalQueue")
    ]
    for one in of_kind(objects, "LocalQueue"):
        if one["spec"]["clusterQueue"] not in _names(objects, "ClusterQueue"):
            found.append(f"{' '.join(key(one))}: ClusterQueue {one['spec']['clusterQueue']}")
    for one in of_kind(objects, "ClusterQueue"):
        flavors = {flavor["name"] for group in one["spec"]["resourceGroups"] for flavor in group["flavors"]}
        found += [f"{' '.join(key(one))}: flavor {name}" for name in flavors - _names(objects, "ResourceFlavor")]
    return found


RULES: tuple[Rule, ...] = (
    secrets_are_documented, config_maps_exist, volumes_are_there_and_used, accounts_and_classes_exist, probes_have_their_port,
    services_lead_somewhere, addresses_are_services, budgets_fit, queues_exist,
)  # fmt: skip
