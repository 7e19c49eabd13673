"""What KubeRay 1.7's operator and the CEL rules of its CRDs refuse, beyond the schema. One function a rule.

A rule takes the rendered objects and returns its findings as lines. Each has a manifest that breaks it in test_rules.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from manifests.render import Object, key
from manifests.workloads import clusters, of_kind

Rule = Callable[[list[Object]], list[str]]

_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_NAME = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def _jobs(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    for one in of_kind(objects, "RayJob"):
        yield " ".join(key(one)), one["spec"]


def _groups(cluster: Object) -> Iterator[tuple[str, Object]]:
    yield "head", cluster["headGroupSpec"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group


def _env(group: Object) -> dict[str, Any]:
    return {item["name"]: item.get("value") for item in group["template"]["spec"]["containers"][0].get("env", [])}


def names_are_dns_1035_and_short(objects: list[Object]) -> list[str]:
    """A RayCluster's name has at most 53 characters, a RayJob's 47: six are added for its cluster."""
    longest = {"RayCluster": 53, "RayJob": 47}
    return [
        f"{' '.join(key(one))}: expected at most {longest[one['kind']]} of a-z, 0-9 and -, a letter first"
        for one in objects
        if one["kind"] in longest
        and not (
            re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", one["metadata"]["name"])
            and len(one["metadata"]["name"]) <= longest[one["kind"]]
        )
    ]


def suspended_jobs_shut_their_cluster_down(objects: list[Object]) -> list[str]:
    """Suspending deletes the cluster: shutdownAfterJobFinishes must be true, and the cluster the job's own."""
    return [
        f"{name}: suspend needs shutdownAfterJobFinishes and no clusterSelector"
        for name, spec in _jobs(objects)
        if "suspend" in spec and (not spec.get("shutdownAfterJobFinishes") or spec.get("clusterSelector"))
    ]


def ttl_needs_shutdown(objects: list[Object]) -> list[str]:
    """ttlSecondsAfterFinished counts only with shutdownAfterJobFinishes, and is not negative."""
    return [
        f"{name}: ttlSecondsAfterFinished {spec['ttlSecondsAfterFinished']}"
        for name, spec in _jobs(objects)
        if spec.get("ttlSecondsAfterFinished", 0) < 0
        or (spec.get("ttlSecondsAfterFinished", 0) and not spec.get("shutdownAfterJobFinishes"))
    ]


def deletion_strategy_is_of_one_kind(objects: list[Object]) -> list[str]:
    """Either rules, without shutdownAfterJobFinishes, or both onSuccess and onFailure; a rule has one condition."""
    found = []
    for name, spec in _jobs(objects):
        strategy = spec.get("deletionStrategy")
        if strategy is None:
            continue
        rules, old = strategy.get("deletionRules", []), {"onSuccess", "onFailure"} & set(strategy)
        if bool(rules) == bool(old) or len(old) == 1 or (rules and spec.get("shutdownAfterJobFinishes")):
            found.append(f"{name}: deletionStrategy {sorted(strategy)}")
        for rule in rules:
            if len({"jobStatus", "jobDeploymentStatus"} & set(rule["condition"])) != 1:
                found.append(f"{name}: deletion rule {rule}")
    return found


def a_cluster_is_given_or_selected(objects: list[Object]) -> list[str]:
    """One of rayClusterSpec and clusterSelector."""
    return [
        f"{name}: expected either rayClusterSpec or clusterSelector"
        for name, spec in _jobs(objects)
        if ("rayClusterSpec" in spec) == bool(spec.get("clusterSelector"))
    ]


def submission_mode_exists(objects: list[Object]) -> list[str]:
    """The schema takes any text."""
    return [
        f"{name}: submissionMode {spec['submissionMode']!r}, expected one of {', '.join(_MODES)}"
        for name, spec in _jobs(objects)
        if spec.get("submissionMode", _MODES[0]) not in _MODES
    ]


def retries_need_a_cluster_of_their_own(objects: list[Object]) -> list[str]:
    """backoffLimit makes a new cluster for each attempt: not with clusterSelector, not with InteractiveMode."""
    return [
        f"{name}: backoffLimit {spec['backoffLimit']} is impossible here"
        for name, spec in _jobs(objects)
        if spec.get("backoffLimit", 0) < 0
        or (
            spec.get("backoffLimit")
            and (spec.get("clusterSelector") or spec.get("submissionMode") == "InteractiveMode")
        )
    ]


def sidecar_mode_has_no_submitter(objects: list[Object]) -> list[str]:
    """SidecarMode takes neither submitterPodTemplate nor submitterConfig nor clusterSelector."""
    return [
        f"{name}: SidecarMode with {', '.join(extra)}"
        for name, spec in _jobs(objects)
        if spec.get("submissionMode") == "SidecarMode"
        and (extra := sorted({"submitterPodTemplate", "submitterConfig", "clusterSelector"} & set(spec)))
    ]


def deadlines_are_positive(objects: list[Object]) -> list[str]:
    """activeDeadlineSeconds and preRunningDeadlineSeconds; the schema takes 0 and less for the first."""
    return [
        f"{name}: {field} {spec[field]}"
        for name, spec in _jobs(objects)
        for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds")
        if spec.get(field, 1) <= 0
    ]


def runtime_environment_is_yaml(objects: list[Object]) -> list[str]:
    """runtimeEnvYAML holds a mapping."""
    found = []
    for name, spec in _jobs(objects):
        try:
            value = yaml.safe_load(spec.get("runtimeEnvYAML", "{}"))
        except yaml.YAMLError as error:
            found.append(f"{name}: runtimeEnvYAML: {error}")
        else:
            found += [] if isinstance(value, dict) else [f"{name}: runtimeEnvYAML is {value!r}"]
    return found


def manager_is_known(objects: list[Object]) -> list[str]:
    """managedBy is one of two; the other half of its rule, that it never changes, is the server's alone."""
    specs = [(" ".join(key(one)), spec) for one, spec in clusters(objects)] + list(_jobs(objects))
    return [
        f"{name}: managedBy {spec['managedBy']!r}"
        for name, spec in specs
        if spec.get("managedBy", _MANAGERS[0]) not in _MANAGERS
    ]


def resources_are_said_once(objects: list[Object]) -> list[str]:
    """num-cpus, num-gpus, memory, resources in rayStartParams, or the group's `resources`; not both."""
    return [
        f"{' '.join(key(one))} {group}: resources and rayStartParams"
        for one, cluster in clusters(objects)
        for group, spec in _groups(cluster)
        if spec.get("resources")
        and {"num-cpus", "num-gpus", "memory", "resources"} & set(spec.get("rayStartParams", {}))
    ]


def labels_are_in_their_field(objects: list[Object]) -> list[str]:
    """Node labels go into the group's `labels`, never into rayStartParams, and are spelt as Kubernetes' are."""
    found = []
    for one, cluster in clusters(objects):
        for group, spec in _groups(cluster):
            if "labels" in spec.get("rayStartParams", {}):
                found.append(f"{' '.join(key(one))} {group}: labels in rayStartParams")
            for name, value in spec.get("labels", {}).items():
                if not (_LABEL_NAME.fullmatch(name) and _LABEL_VALUE.fullmatch(value)):
                    found.append(f"{' '.join(key(one))} {group}: label {name}={value}")
    return found


def groups_are_named_once_and_in_order(objects: list[Object]) -> list[str]:
    """Group names differ, and minReplicas <= replicas <= maxReplicas."""
    found = []
    for one, cluster in clusters(objects):
        names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
        if len(set(names)) < len(names):
            found.append(f"{' '.join(key(one))}: groups {names}")
        for group in cluster["workerGroupSpecs"]:
            least = group["minReplicas"]
            sizes = [least, group.get("replicas", least), group["maxReplicas"]]
            if sizes != sorted(sizes) or sizes[0] < 0:
                found.append(f"{' '.join(key(one))} {group['groupName']}: min, now, max {sizes}")
    return found


def autoscaler_v2_replaces_pods(objects: list[Object]) -> list[str]:
    """With autoscaler v2 the restart policy of all pods is Never; which autoscaler it is, is said in one place."""
    found = []
    for one, cluster in clusters(objects):
        on = bool(cluster.get("enableInTreeAutoscaling"))
        second = on and cluster.get("autoscalerOptions", {}).get("version") == "v2"
        for group, spec in _groups(cluster):
            if second and spec["template"]["spec"].get("restartPolicy", "Never") != "Never":
                found.append(f"{' '.join(key(one))} {group}: restartPolicy with autoscaler v2")
            if on and spec.get("suspend"):
                found.append(f"{' '.join(key(one))} {group}: suspended with an autoscaler")
        said = _env(cluster["headGroupSpec"]).get("RAY_enable_autoscaler_v2")
        if (said in ("1", "true") and not on) or (
            said is not None and "version" in cluster.get("autoscalerOptions", {})
        ):
            found.append(f"{' '.join(key(one))}: RAY_enable_autoscaler_v2={said}")
    return found


def token_needs_a_version(objects: list[Object]) -> list[str]:
    """authOptions.mode token needs rayVersion, 2.52 or later."""
    return [
        f"{' '.join(key(one))}: token authentication with rayVersion {cluster.get('rayVersion')!r}"
        for one, cluster in clusters(objects)
        if cluster.get("authOptions", {}).get("mode") == "token"
        and not (
            (version := re.match(r"(\d+)\.(\d+)", cluster.get("rayVersion", "")))
            and (int(version[1]), int(version[2])) >= (2, 52)
        )
    ]


def only_rayclusters_are_recreated(objects: list[Object]) -> list[str]:
    """upgradeStrategy Recreate replaces pods when the spec changes; a RayJob's cluster, which keeps its spec, may not have it."""
    return [
        f"{' '.join(key(one))}: upgradeStrategy {cluster.get('upgradeStrategy')}"
        for one, cluster in clusters(objects)
        if (cluster.get("upgradeStrategy", {}).get("type") == "Recreate") != (one["kind"] == "RayCluster")
    ]


def fault_tolerance_is_in_its_field(objects: list[Object]) -> list[str]:
    """Redis variables on the head would switch GCS fault tolerance on past gcsFaultToleranceOptions."""
    return [
        f"{' '.join(key(one))}: {name} on the head"
        for one, cluster in clusters(objects)
        for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME")
        if name in _env(cluster["headGroupSpec"])
    ]


RULES: tuple[Rule, ...] = (
    names_are_dns_1035_and_short, suspended_jobs_shut_their_cluster_down, ttl_needs_shutdown, deletion_strategy_is_of_one_kind,
    a_cluster_is_given_or_selected, submission_mode_exists, retries_need_a_cluster_of_their_own, sidecar_mode_has_no_submitter,
    deadlines_are_positive, runtime_environment_is_yaml, manager_is_known, resources_are_said_once, labels_are_in_their_field,
    groups_are_named_once_and_in_order, autoscaler_v2_replaces_pods, token_needs_a_version, fault_tolerance_is_in_its_field,
    only_rayclusters_are_recreated,
)  # fmt: skip

CEL = {
    "!((has(self.onSuccess) || has(self.onFailure)) && has(self.deletionRules))": deletion_strategy_is_of_one_kind,
    "((has(self.onSuccess) && has(self.onFailure)) || has(self.deletionRules))": deletion_strategy_is_of_one_kind,
    "!(has(self.jobStatus) && has(self.jobDeploymentStatus))": deletion_strategy_is_of_one_kind,
    "has(self.jobStatus) || has(self.jobDeploymentStatus)": deletion_strategy_is_of_one_kind,
    "self in ['ray.io/kuberay-operator', 'kueue.x-k8s.io/multikueue']": manager_is_known,
    "self == oldSelf": None,  # what never changes: an update alone can break it
}
"""Which rule mirrors which rule in CEL of the CRDs."""
