"""Who may reach whom, as the NetworkPolicies say: what a network plugin would decide, for every pair of pods.

Ends are named by role: head, worker, submitter, the app.kubernetes.io/name of other pods, and outside the namespace
`operator`, `prometheus` and `stranger`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from manifests.kuberay_rules import Rule
from manifests.render import Object, key
from manifests.workloads import Pod, of_kind, pods, selects

ANY = "any"
"""Stands for every port that has no name, such as those of Ray's workers."""


@dataclass(frozen=True)
class End:
    """One end of a connection. namespace: labels of the namespace of an end outside ours; ports: name -> number."""

    role: str
    labels: dict[str, str]
    namespace: dict[str, str] | None = None
    ports: dict[str, int] = field(default_factory=dict)


OUTSIDE = (
    End(
        "operator", {"app.kubernetes.io/name": "kuberay-operator"}, {"kubernetes.io/metadata.name": "kuberay-operator"}
    ),
    End("prometheus", {"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"}),
    End(
        "stranger",
        {"app.kubernetes.io/name": "mlflow", "ray.io/is-ray-node": "yes"},
        {"kubernetes.io/metadata.name": "default"},
    ),
)
_DNS = End("dns", {"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"}, {"dns": 53})


def _role(pod: Pod) -> str:
    if pod.group in ("head", "submitter"):
        return pod.group
    return "worker" if pod.group else pod.labels["app.kubernetes.io/name"]


def ends(objects: list[Object]) -> list[End]:
    """Return every kind of pod of the namespace, and who may knock from outside."""
    found = []
    for pod in pods(objects):
        ports = {port["name"]: port["containerPort"] for port in pod.main.get("ports", [])}
        found.append(End(_role(pod), pod.labels, None, {**ports, ANY: 10_002}))
    return [*found, *OUTSIDE]


def _policies(objects: list[Object], end: End, direction: str) -> list[Object]:
    return [
        one["spec"]
        for one in of_kind(objects, "NetworkPolicy")
        if end.namespace is None
        and direction in one["spec"]["policyTypes"]
        and selects(one["spec"]["podSelector"], end.labels)
    ]


def _is(peer: Object, end: End) -> bool:
    if "ipBlock" in peer:
        return False  # pods are not reached by address here
    if ("namespaceSelector" in peer) != (end.namespace is not None):
        return False
    if end.namespace is not None and not selects(peer["namespaceSelector"], end.namespace):
        return False
    return selects(peer.get("podSelector", {}), end.labels)


def _passes(policies: list[Object], rules: str, peers: str, other: End, target: End, port: str) -> bool:
    """Return whether one of the policies lets the connection through; without policies everything passes."""
    return not policies or any(
        ("ports" not in rule or any(item["port"] in (port, target.ports.get(port)) for item in rule["ports"]))
        and (peers not in rule or any(_is(peer, other) for peer in rule[peers]))
        for policy in policies
        for rule in policy.get(rules, [])
    )


def allowed(objects: list[Object], source: End, target: End, port: str) -> bool:
    """Return whether `source` may open a connection to a port of `target`."""
    leaves = _passes(_policies(objects, source, "Egress"), "egress", "to", target, target, port)
    return leaves and _passes(_policies(objects, target, "Ingress"), "ingress", "from", source, target, port)


def reach(objects: list[Object]) -> set[tuple[str, str, str]]:
    """Return (from, to, port) for every connection that is allowed into a pod of the namespace."""
    return {
        (source.role, target.role, port)
        for source in ends(objects)
        for target in ends(objects)
        if target.namespace is None
        for port in target.ports
        if allowed(objects, source, target, port)
    }


def leaves(objects: list[Object]) -> set[tuple[str, str, int]]:
    """Return (from, address block, port) for all that may leave the cluster."""
    return {
        (end.role, peer["ipBlock"]["cidr"], item["port"])
        for end in ends(objects)
        for policy in _policies(objects, end, "Egress")
        for rule in policy.get("egress", [])
        for peer in rule["to"]
        if "ipBlock" in peer
        for item in rule["ports"]
    }


def everything_is_denied_first(objects: list[Object]) -> list[str]:
    """One policy takes all pods, in both directions, and allows nothing."""
    deny = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    there = any(one["spec"] == deny for one in of_kind(objects, "NetworkPolicy"))
    return [] if there else ["no NetworkPolicy denies everything"]


def names_can_be_looked_up(objects: list[Object]) -> list[str]:
    """Every pod reaches the cluster's DNS."""
    return [
        f"{end.role}: no DNS"
        for end in ends(objects)
        if end.namespace is None and not _passes(_policies(objects, end, "Egress"), "egress", "to", _DNS, _DNS, "dns")
    ]


def policies_meet_pods(objects: list[Object]) -> list[str]:
    """What a policy selects is there: its pods, its peers within the namespace, the ports it names."""
    inside, found = ends(objects), []
    for one in of_kind(objects, "NetworkPolicy"):
        spec, name = one["spec"], " ".join(key(one))
        own = [end for end in inside if end.namespace is None and selects(spec["podSelector"], end.labels)]
        found += [] if own else [f"{name}: selects no pod"]
        for rules, peers in (("ingress", "from"), ("egress", "to")):
            for rule in spec.get(rules, []):
                chosen = [end for peer in rule[peers] for end in [*inside, _DNS] if _is(peer, end)]
                for peer in rule[peers]:
                    if "ipBlock" not in peer and not any(_is(peer, end) for end in [*inside, _DNS]):
                        found.append(f"{name}: {rules} {peer} is nobody")
                targets = own if rules == "ingress" else chosen
                for item in rule.get("ports", []):
                    known = {port for end in targets for port in (*end.ports, *end.ports.values())}
                    if targets and item["port"] not in known:
                        found.append(f"{name}: no port {item['port']}")
    return found


RULES: tuple[Rule, ...] = (everything_is_denied_first, names_can_be_looked_up, policies_meet_pods)
