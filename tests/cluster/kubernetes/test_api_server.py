"""What a real API server, its scheduler and its controllers make of the overlays: see api_server.py for what it needs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import api_server
import pytest
from api_server import ApiServer, RefusedError, fake_node, until
from manifests.render import Object
from manifests.workloads import of_kind, pods
from write_out import as_pod

NAMESPACE = "slerp-tat"
STANDING = ("Namespace", "ServiceAccount", "PriorityClass")  # what the admission of pods asks for
LARGE = {"cpu": "64", "memory": "256Gi", "ephemeral-storage": "500Gi", "pods": "50"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not api_server.programs(), reason="needs the programs of Kubernetes in KUBEBUILDER_ASSETS"),
]
controllers = pytest.mark.skipif(
    not api_server.has_controllers(), reason="needs the scheduler and the controllers, too"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ApiServer]:
    """The server, with KubeRay's, Kueue's and Prometheus' kinds, and what pods of prod stand on."""
    with api_server.running(tmp_path_factory.mktemp("kubernetes")) as server:
        for one in api_server.custom_kinds():
            server.create(one)
            until(lambda one=one: served(server, one))
        yield server


def served(server: ApiServer, definition: Object) -> bool:
    group, version = definition["spec"]["group"], definition["spec"]["versions"][0]["name"]
    kinds = server.call("GET", f"/apis/{group}/{version}")["resources"]
    return definition["spec"]["names"]["kind"] in {found["kind"] for found in kinds}


def stand(server: ApiServer, objects: list[Object]) -> None:
    """Create what pods of these objects need to be taken, and wait until the controllers have done theirs."""
    for one in objects:
        if one["kind"] in STANDING:
            try:
                server.create(one)
            except RefusedError as error:
                if error.status != 409:  # there
                    raise
    if api_server.has_controllers():
        default = {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "default", "namespace": NAMESPACE},
        }
        until(lambda: server.get(default))


def ray_pods(objects: list[Object]) -> dict[str, Object]:
    """Return the pods that KubeRay makes, by "owner group"."""
    return {f"{pod.owner['metadata']['name']} {pod.group}": as_pod(pod) for pod in pods(objects) if pod.group}


@pytest.mark.parametrize("overlay", ["dev", "prod", "kueue"])
def test_every_object_and_every_pod_is_taken(server, rendered, overlay):
    parts = {"kueue": ("kueue", "kueue/jobs", "kueue/quota")}.get(overlay, (overlay, f"{overlay}/jobs"))
    objects = [one for part in parts for one in rendered(part)]
    stand(server, objects)
    refused = []
    for one in [*objects, *ray_pods(objects).values()]:
        if one["kind"] in STANDING:
            continue
        try:
            server.create(one, dryRun="All", fieldValidation="Strict")
        except RefusedError as error:
            refused.append(f"{one['kind']} {one['metadata']['name']}: {error}")
    assert refused == []


def test_what_is_wrong_is_refused(server, rendered):
    objects = rendered("prod")
    stand(server, objects)
    pod = copy.deepcopy(ray_pods(objects)["interactive decode"])
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": "nowhere", "mountPath": "/nowhere"})
    with pytest.raises(RefusedError, match="nowhere"):
        server.create(pod, dryRun="All")
    policy = copy.deepcopy(of_kind(objects, "NetworkPolicy")[1])
    policy["spec"]["egress"][0]["ports"] = [{"port": 70000}]
    with pytest.raises(RefusedError, match=r"spec\.egress"):
        server.create(policy, dryRun="All")


@pytest.fixture
def placed(server, rendered) -> Iterator[dict[str, Object]]:
    """The pods of tat-train in prod, each placed on a node: one that is a spot machine, one with a GPU, a small one."""
    jobs = rendered("prod/jobs")
    stand(server, [*rendered("prod"), *jobs])
    spot = ("karpenter.sh/capacity-type=spot",)
    nodes = [
        fake_node("small", {**LARGE, "cpu": "6"}),
        fake_node("spot", LARGE, spot, ("spot",)),
        fake_node("gpu", {**LARGE, "nvidia.com/gpu": "1"}, spot, ("spot", "nvidia.com/gpu")),
        fake_node("reserved", {**LARGE, "nvidia.com/gpu": "8"}, (), ("others",)),
    ]
    budgets = [one for one in of_kind(jobs, "PodDisruptionBudget") if one["metadata"]["name"].startswith("tat-train")]
    own = {name.partition(" ")[2]: pod for name, pod in ray_pods(jobs).items() if name.startswith("tat-train ")}
    made = []
    try:
        for one in [*nodes, *budgets, *own.values()]:
            made.append(server.create(one))
        yield own
    finally:
        for one in reversed(made):
            server.call("DELETE", server.path(one, one["metadata"]["name"]), gracePeriodSeconds="0")


@controllers
def test_pods_are_placed_where_they_are_meant_to_be(server, placed):
    """The head and the submitter on a machine that stays, decoders on a spot machine, the encoder on the GPU."""

    def nodes() -> dict[str, str]:
        found = {name: server.get(pod)["spec"].get("nodeName") for name, pod in placed.items()}
        return found if all(found.values()) else {}

    assert until(nodes) == {"head": "small", "submitter": "small", "decode": "spot", "gpu": "gpu"}
    ranks = {name: server.get(pod)["spec"]["priority"] for name, pod in placed.items()}
    assert ranks["head"] == ranks["submitter"] > ranks["decode"] == ranks["gpu"]


@controllers
def test_a_drain_waits_for_head_and_submitter_and_takes_workers(server, placed):
    for pod in placed.values():
        until(lambda pod=pod: server.get(pod)["spec"].get("nodeName"))
        ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        server.call("PATCH", server.path(pod, pod["metadata"]["name"], "status"), {"status": ready})

    def guarded() -> bool:
        budgets = server.call("GET", f"/apis/policy/{'v1' if server.minor() > 20 else 'v1beta1'}/poddisruptionbudgets")
        found = [one["status"] for one in budgets["items"]]
        return len(found) == 2 and all(one.get("currentHealthy") == 1 for one in found)

    until(guarded)
    for name, pod in placed.items():
        eviction = {
            "apiVersion": "policy/v1" if server.minor() > 21 else "policy/v1beta1",
            "kind": "Eviction",
            "metadata": {"name": pod["metadata"]["name"], "namespace": NAMESPACE},
        }
        path = server.path(pod, pod["metadata"]["name"], "eviction")
        if name in ("head", "submitter"):
            with pytest.raises(RefusedError, match="disruption budget"):
                server.call("POST", path, eviction, dryRun="All")
        else:
            server.call("POST", path, eviction, dryRun="All")
