"""What the network policies let through between the nodes of a local network cluster."""

from __future__ import annotations

import copy
from typing import Any

import network
import pytest
from network_policies import Way, let_through
from processes import StartError

WHO = {
    ("ray.io/is-ray-node", "yes"): "10.0.0.10-10.0.0.19",
    ("ray.io/node-type", "head"): "10.0.0.10-10.0.0.10",
    ("app.kubernetes.io/name", "mlflow"): "10.0.0.1-10.0.0.1",
    ("app.kubernetes.io/name", "seaweedfs"): "10.0.0.3-10.0.0.3",
    ("slerp-tat/role", "submitter"): "10.0.0.2-10.0.0.2",
}
WORKER = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
HEAD = WORKER | {"ray.io/node-type": "head"}
BOTH = [Way(True, "10.0.0.10-10.0.0.19", "TCP", None), Way(False, "10.0.0.10-10.0.0.19", "TCP", None)]
MLFLOW = Way(False, "10.0.0.1-10.0.0.1", "TCP", 5000)
S3 = Way(False, "10.0.0.3-10.0.0.3", "TCP", 8333)


@pytest.fixture
def policies() -> list[dict[str, Any]]:
    return network.network_policies()


def named(policies: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = (policy for policy in policies if policy["metadata"]["name"] == name)
    return found["spec"]


def test_of_the_manifests_policies(policies) -> None:
    assert set(let_through(WORKER, policies, WHO)) == {*BOTH, MLFLOW, S3}
    assert set(let_through(HEAD, policies, WHO)) == {*BOTH, MLFLOW, S3, Way(True, "10.0.0.2-10.0.0.2", "TCP", 8265)}
    assert set(let_through({"app.kubernetes.io/name": "mlflow"}, policies, WHO)) == {
        Way(True, "10.0.0.10-10.0.0.19", "TCP", 5000),
        S3,
    }
    assert set(let_through({"app": "unknown"}, policies, WHO)) == {S3}  # all but two of our own kinds
    assert set(let_through({"slerp-tat/role": "submitter"}, policies, WHO)) == {
        Way(False, "10.0.0.10-10.0.0.10", "TCP", 8265)
    }


def test_what_a_policy_does_not_let_through_is_kept_out(policies) -> None:
    without = [policy for policy in policies if policy["metadata"]["name"] != "ray-to-mlflow"]
    assert set(let_through(WORKER, without, WHO)) == {*BOTH, S3}
    named(policies, "ray-dashboard")["ingress"][0]["ports"] = [{"port": 53, "protocol": "UDP"}]
    assert Way(True, "10.0.0.2-10.0.0.2", "UDP", 53) in set(let_through(HEAD, policies, WHO))


def test_an_operator_that_kubernetes_has_not_is_an_error(policies) -> None:
    named(policies, "to-seaweedfs")["podSelector"]["matchExpressions"][0]["operator"] = "Without"
    with pytest.raises(StartError, match="NetworkPolicy to-seaweedfs: operator 'Without' is not one of In, NotIn"):
        list(let_through(WORKER, policies, WHO))


@pytest.mark.parametrize(
    "peer",
    [
        {"podSelector": {}},
        {"podSelector": {"matchLabels": {"app": "unknown"}}},
        {"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"}}},
        {"podSelector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]}},
        {"ipBlock": {"cidr": "0.0.0.0/0"}},
    ],
)
def test_what_is_not_understood_is_an_error_that_names_the_policy(policies, peer) -> None:
    changed = copy.deepcopy(policies)
    named(changed, "ray-nodes")["egress"][0]["to"] = [peer]
    with pytest.raises(StartError, match="NetworkPolicy ray-nodes"):
        list(let_through(WORKER, changed, WHO))
