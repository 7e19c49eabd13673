"""The pods that rendered objects lead to, with what KubeRay adds to them: labels, the autoscaler's sidecar, a worker's init container."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from manifests.render import Object

_UNITS = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_WAIT = {"cpu": "200m", "memory": "256Mi"}  # fixed in KubeRay


@dataclass(frozen=True)
class Pod:
    """A kind of pod. owner: whose; group: head, a worker group's name, submitter or "" (no Ray pod); count: at most."""

    owner: Object
    group: str
    labels: dict[str, str]
    spec: Object
    count: int = 1

    @property
    def name(self) -> str:
        """What a message calls it."""
        return " ".join(part for part in (self.owner["kind"], self.owner["metadata"]["name"], self.group) if part)

    @property
    def containers(self) -> list[Object]:
        """Init containers and containers."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def main(self) -> Object:
        """The container that the pod is there for."""
        found: Object = self.spec["containers"][0]
        return found

    def amount(self, resource: str, *, of: str = "requests") -> Decimal:
        """Return how much of a resource all its containers ask for; an init container counts where it asks for more."""
        asked = [quantity(one["resources"].get(of, {}).get(resource, 0)) for one in self.spec["containers"]]
        before = [
            quantity(one["resources"].get(of, {}).get(resource, 0)) for one in self.spec.get("initContainers", [])
        ]
        return max(sum(asked, Decimal(0)), *before, Decimal(0))


def quantity(value: str | float) -> Decimal:
    """Return a Kubernetes quantity as a number: 500m -> 0.5, 2Ki -> 2048."""
    text = str(value)
    number = text.rstrip("mkMGTi")
    return Decimal(number) * _UNITS[text[len(number) :]]


def of_kind(objects: Iterable[Object], kind: str) -> list[Object]:
    """Return the objects of a kind."""
    return [one for one in objects if one["kind"] == kind]


def clusters(objects: Iterable[Object]) -> Iterator[tuple[Object, Object]]:
    """Yield every RayCluster and RayJob with its cluster's spec."""
    for one in objects:
        if one["kind"] == "RayCluster":
            yield one, one["spec"]
        elif one["kind"] == "RayJob" and "rayClusterSpec" in one["spec"]:
            yield one, one["spec"]["rayClusterSpec"]


def pods(objects: Iterable[Object]) -> list[Pod]:
    """Return every kind of pod that the objects lead to."""
    objects = list(objects)
    found = []
    for one in of_kind(objects, "Deployment"):
        template = one["spec"]["template"]
        found.append(Pod(one, "", template["metadata"]["labels"], template["spec"], one["spec"]["replicas"]))
    for one in of_kind(objects, "RayJob"):
        template = one["spec"]["submitterPodTemplate"]
        found.append(Pod(one, "submitter", template["metadata"]["labels"], template["spec"]))
    for owner, spec in clusters(objects):
        found += ray_pods(owner, spec)
    return found


def ray_pods(owner: Object, cluster: Object) -> list[Pod]:
    """Return the head and the workers of a cluster as KubeRay makes them; groups of autoscaled clusters count fully grown."""
    head = cluster["headGroupSpec"]
    spec = head["template"]["spec"]
    if cluster.get("enableInTreeAutoscaling"):
        spec = {**spec, "containers": [*spec["containers"], _autoscaler(spec, cluster["autoscalerOptions"])]}
    found = [Pod(owner, "head", _labels(owner, "head", "headgroup", head), spec)]
    for group in cluster["workerGroupSpecs"]:
        template = group["template"]["spec"]
        main = template["containers"][0]
        wait = {
            **{key: main[key] for key in ("image", "securityContext", "volumeMounts", "envFrom") if key in main},
            "name": "wait-gcs-ready",
            "resources": {"requests": _WAIT, "limits": _WAIT},
        }
        template = {**template, "initContainers": [*template.get("initContainers", []), wait]}
        labels = _labels(owner, "worker", group["groupName"], group)
        found.append(Pod(owner, group["groupName"], labels, template, group["maxReplicas"]))
    return found


def _autoscaler(spec: Object, options: Object) -> Object:
    kept = ("resources", "securityContext", "volumeMounts", "imagePullPolicy")
    return {
        "name": "autoscaler",
        "image": spec["containers"][0]["image"],
        **{key: options[key] for key in kept if key in options},
    }


def _labels(owner: Object, node_type: str, group_name: str, group: Object) -> dict[str, str]:
    added = {
        "ray.io/is-ray-node": "yes",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    fixed = {"ray.io/cluster": owner["metadata"]["name"], "ray.io/node-type": node_type, "ray.io/group": group_name}
    own = group["template"].get("metadata", {}).get("labels", {})
    return {**added, **own, **group.get("labels", {}), **fixed}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Return whether a label selector takes these labels; the empty one takes all."""
    if any(labels.get(name) != value for name, value in selector.get("matchLabels", {}).items()):
        return False
    tests: dict[str, Any] = {
        "In": lambda rule: labels.get(rule["key"]) in rule["values"],
        "NotIn": lambda rule: labels.get(rule["key"]) not in rule["values"],
        "Exists": lambda rule: rule["key"] in labels,
        "DoesNotExist": lambda rule: rule["key"] not in labels,
    }
    return all(tests[rule["operator"]](rule) for rule in selector.get("matchExpressions", []))
