"""What Kubernetes' NetworkPolicies let through, for pods that are addresses here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from processes import StartError


class Way(NamedTuple):
    """Packets that may pass. incoming: else outgoing; addresses: the other side's, "first-last"; port: None for any."""

    incoming: bool
    addresses: str
    protocol: str
    port: int | None


def let_through(
    labels: Mapping[str, str], policies: Iterable[Mapping[str, Any]], who: Mapping[tuple[str, str], str]
) -> Iterator[Way]:
    """Yield what the policies let in and out of a pod with these labels; all else is kept out.

    who: label and value to the addresses of the pods that have it. Peers in other namespaces (DNS, Prometheus, the
    operator) are nobody. A selector that is not understood, or names a label that is not in `who`, raises StartError.
    """
    for policy in policies:
        name, spec = policy["metadata"]["name"], policy["spec"]
        if not _selects(spec["podSelector"], labels, name):
            continue
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in spec.get(direction, []):
                for peer in rule[peers]:
                    if peer.keys() - {"podSelector", "namespaceSelector"}:
                        raise StartError(f"NetworkPolicy {name}: only pods are understood here, not {peer}")
                    if "namespaceSelector" in peer:
                        continue
                    addresses = _addresses(_wanted(peer["podSelector"], name), name, who)
                    for port in rule.get("ports", [{"port": None}]):
                        yield Way(direction == "ingress", addresses, port.get("protocol", "TCP"), port["port"])


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str], policy: str) -> bool:
    """Whether a policy's own podSelector takes in a pod with these labels."""
    for asked in selector.get("matchExpressions", []):
        key, values = asked["key"], asked.get("values", [])
        holds = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }
        if asked["operator"] not in holds:
            raise StartError(f"NetworkPolicy {policy}: operator {asked['operator']!r} is not one of {', '.join(holds)}")
        if not holds[asked["operator"]]:
            return False
    rest = {key: value for key, value in selector.items() if key != "matchExpressions"}
    return _wanted(rest, policy).items() <= labels.items()


def _wanted(selector: Mapping[str, Any], name: str) -> dict[str, str]:
    if selector.keys() - {"matchLabels"}:
        raise StartError(f"NetworkPolicy {name}: only matchLabels is understood here, not {selector}")
    return dict(selector.get("matchLabels", {}))


def _addresses(wanted: Mapping[str, str], name: str, who: Mapping[tuple[str, str], str]) -> str:
    found = [who.get(label) for label in wanted.items()]
    if len(found) != 1 or found[0] is None:
        raise StartError(f"NetworkPolicy {name}: who is {dict(wanted)} here? Known: {', '.join(map('='.join, who))}")
    return found[0]
