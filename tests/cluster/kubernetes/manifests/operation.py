"""How clusters and jobs are run: versions, graceful ends, retries that resume, memory that cannot be overcommitted, Kueue's rules."""

from __future__ import annotations

import shlex
import tomllib
from importlib import metadata
from pathlib import Path

from manifests.kuberay_rules import Rule
from manifests.references import QUEUE
from manifests.render import Object, key
from manifests.workloads import clusters, of_kind, pods, quantity
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

_PYPROJECT = Path(__file__).resolve().parents[4] / "pyproject.toml"
SUBCLUSTER = "ray-subcluster"
_POD_SETS = 8  # of a Kueue workload
_RESUMED_BY = {"jobs/tat_train.py": "--name", "jobs/batch_retrieve.py": "--name", "jobs/embed.py": "--output"}
_SPOT_LABELS = {
    "karpenter.sh/capacity-type", "eks.amazonaws.com/capacityType", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority",
}  # fmt: skip
_SUBMITTERS = 10  # pods that may be lost in an attempt of days
_SPARE_MEMORY = 2e9  # of a Ray pod, beside its object store: Ray itself and one worker


def versions_are_those_installed(objects: list[Object]) -> list[str]:
    """rayVersion is Ray's, and our own images, until a digest replaces it, have the package's version."""
    ray = metadata.version("ray")
    ours = tomllib.loads(_PYPROJECT.read_text())["project"]["version"]
    found = [
        f"{' '.join(key(one))}: rayVersion {cluster.get('rayVersion')}, installed is {ray}"
        for one, cluster in clusters(objects)
        if cluster.get("rayVersion") != ray
    ]
    images = {one["image"] for pod in pods(objects) for one in pod.containers}
    tagged = [image for image in images if image.startswith("slerp-tat") and "@" not in image]
    return found + [f"image {image}, the package is {ours}" for image in tagged if not image.endswith(f":{ours}")]


def jobs_are_retried_and_resume(objects: list[Object]) -> list[str]:
    """A RayJob is retried on a new cluster, within a deadline, goes on by a fixed name, and cleans up after itself."""
    found = []
    for one in of_kind(objects, "RayJob"):
        spec, words = one["spec"], shlex.split(one["spec"]["entrypoint"])
        good = {
            "backoffLimit": spec.get("backoffLimit", 0) > 0,
            "submitterConfig.backoffLimit": spec.get("submitterConfig", {}).get("backoffLimit", 2) >= _SUBMITTERS,
            "activeDeadlineSeconds": "activeDeadlineSeconds" in spec,
            "preRunningDeadlineSeconds": "preRunningDeadlineSeconds" in spec,
            "shutdownAfterJobFinishes": spec.get("shutdownAfterJobFinishes") is True,
            "ttlSecondsAfterFinished": spec.get("ttlSecondsAfterFinished", 0) > 0,
            "entrypoint": len(words) > 1 and _RESUMED_BY.get(words[1], "") in words,
        }
        found += [f"{' '.join(key(one))}: {name}" for name, fine in good.items() if not fine]
    return found


def stopping_leaves_time(objects: list[Object]) -> list[str]:
    """Drivers get SIGINT; a head lives longer than its jobs may take to end; workers drain as Ray does at SIGTERM, without a hook before."""
    (settings,) = (one["data"] for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"] == "settings")
    wait = int(settings.get("RAY_JOB_STOP_WAIT_TIME_S", "3"))
    found = [] if settings.get("RAY_JOB_STOP_SIGNAL") == "SIGINT" else ["RAY_JOB_STOP_SIGNAL is not SIGINT"]
    for pod in pods(objects):
        if pod.group in ("", "submitter"):
            continue
        if ("preStop" in pod.main.get("lifecycle", {})) != (pod.group == "head"):
            found.append(f"{pod.name}: a preStop hook is for heads")
        least = (wait if pod.group == "head" else int(RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S)) + 20
        if pod.spec.get("terminationGracePeriodSeconds", 30) < least:
            found.append(f"{pod.name}: killed before {least} s")
    return found


def memory_is_reserved(objects: list[Object]) -> list[str]:
    """Requests equal limits for memory, disk and GPUs; CPUs and memory are always asked for."""
    found = []
    for pod in pods(objects):
        for one in pod.containers:
            asked, most = (one.get("resources", {}).get(name, {}) for name in ("requests", "limits"))
            wrong = [name for name in {*asked, *most} - {"cpu"} if str(asked.get(name)) != str(most.get(name))]
            wrong += [name for name in ("cpu", "memory") if name not in asked or name not in most]
            found += [f"{pod.name} {one['name']}: {', '.join(sorted(wrong))}"] if wrong else []
    return found


def volumes_in_memory_fit(objects: list[Object]) -> list[str]:
    """The object store fits into /dev/shm, and that into the memory, with room for Ray; volumes on disk fit what is asked for."""
    found = []
    for owner, cluster in clusters(objects):
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            spec, name = group["template"]["spec"], f"{' '.join(key(owner))} {group.get('groupName', 'head')}"
            sizes = {one["name"]: one["emptyDir"] for one in spec["volumes"] if "emptyDir" in one}
            mounts = {one["mountPath"]: one["name"] for one in spec["containers"][0]["volumeMounts"]}
            shared = sizes.get(mounts.get("/dev/shm", ""), {})  # noqa: S108
            store = float(group["rayStartParams"].get("object-store-memory", "inf"))
            limits = spec["containers"][0]["resources"]["limits"]
            room, memory = float(quantity(shared.get("sizeLimit", 0))), float(quantity(limits["memory"]))
            if shared.get("medium") != "Memory" or not store <= room <= memory - _SPARE_MEMORY:
                found.append(f"{name}: object store {store:.3g}, /dev/shm {room:.3g}, memory {memory:.3g}")
            disk = sum(quantity(one.get("sizeLimit", "inf")) for one in sizes.values() if one.get("medium") != "Memory")
            if disk > quantity(limits["ephemeral-storage"]):
                found.append(f"{name}: volumes of {disk:.3g} bytes, ephemeral-storage {limits['ephemeral-storage']}")
    return found


def memory_is_given_out_once(objects: list[Object]) -> list[str]:
    """What Ray gives out of a worker's memory, its object store, Ray itself and one worker fit into its limit."""
    found = []
    for one, cluster in clusters(objects):
        for group in cluster["workerGroupSpecs"]:
            parameters, pod = group["rayStartParams"], group["template"]["spec"]["containers"][0]
            given, store = (float(parameters.get(name, "inf")) for name in ("memory", "object-store-memory"))
            limit = float(quantity(pod["resources"]["limits"]["memory"]))
            if given + store > limit - _SPARE_MEMORY:
                found.append(
                    f"{' '.join(key(one))} {group['groupName']}: {given:.3g} + {store:.3g} of {limit:.3g} bytes"
                )
    return found


def heads_run_no_tasks(objects: list[Object]) -> list[str]:
    """num-cpus is 0 on heads; workers have what their limits say, and GPUs only where they ask for them."""
    found = []
    for one, cluster in clusters(objects):
        if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            found.append(f"{' '.join(key(one))}: tasks on the head")
        for group in cluster["workerGroupSpecs"]:
            said = {"num-cpus", "num-gpus"} & set(group["rayStartParams"])
            cpus = quantity(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
            if said or cpus % 1:
                found.append(f"{' '.join(key(one))} {group['groupName']}: {sorted(said)}, {cpus} CPUs")
    return found


def nodes_are_in_no_subcluster(objects: list[Object]) -> list[str]:
    """A data set without a selector of its own, as all of ours, sees only nodes without this label."""
    return [
        f"{' '.join(key(one))} {group['groupName']}: label {SUBCLUSTER}"
        for one, cluster in clusters(objects)
        for group in cluster["workerGroupSpecs"]
        if SUBCLUSTER in group.get("labels", {})
    ]


def workers_only_on_spot_machines(objects: list[Object]) -> list[str]:
    """Workers tolerate spot machines' taints, nobody else; heads and submitters keep off those without taint; GPU pods tolerate theirs."""
    found = []
    for pod in pods(objects):
        keys = {one["key"] for one in pod.spec.get("tolerations", [])}
        spot = bool(keys & {"spot", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"})
        worker = pod.labels.get("ray.io/node-type") == "worker"
        gpu = bool(pod.amount("nvidia.com/gpu"))
        if spot != worker or ("nvidia.com/gpu" in keys) != gpu:
            found.append(f"{pod.name}: tolerations {sorted(keys)}")
        if pod.group in ("head", "submitter") and not _keeps_off_spot(pod.spec):
            found.append(f"{pod.name}: may be on a spot machine")
    return found


def _keeps_off_spot(spec: Object) -> bool:
    terms = spec.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    rules = [rule for term in terms.get("nodeSelectorTerms", []) for rule in term["matchExpressions"]]
    return {rule["key"] for rule in rules if rule["operator"] == "NotIn"} >= _SPOT_LABELS


def kueue_takes_it(objects: list[Object]) -> list[str]:
    """Of what has a queue: fixed size, a cluster of its own that is shut down, suspended by Kueue alone, few groups, no reserved name."""
    found = []
    for one, cluster in clusters(objects):
        if QUEUE not in one["metadata"].get("labels", {}):
            continue
        spec, groups = one["spec"], [group["groupName"] for group in cluster["workerGroupSpecs"]]
        sets = len(groups) + 1 + (spec.get("submissionMode", "K8sJobMode") == "K8sJobMode" and one["kind"] == "RayJob")
        good = {
            "autoscaler": not cluster.get("enableInTreeAutoscaling"),
            "number of pod sets": sets <= _POD_SETS,
            "reserved name of a group": not {"head", "submitter"} & set(groups),
            "replicas": all(group.get("replicas") == group["maxReplicas"] > 0 for group in cluster["workerGroupSpecs"]),
        }
        if one["kind"] == "RayJob":
            good["suspend, which the next kubectl apply would say again"] = "suspend" not in spec
            good["shutdownAfterJobFinishes"] = spec.get("shutdownAfterJobFinishes") is True
        found += [f"{' '.join(key(one))}: {name}" for name, fine in good.items() if not fine]
    return found


def nobody_else_is_pushed_away(objects: list[Object]) -> list[str]:
    """Pods without a class have priority 0: a class of ours above it would evict those of the whole cluster; workers are below heads."""
    values = {one["metadata"]["name"]: one["value"] for one in of_kind(objects, "PriorityClass")}
    found = [f"PriorityClass {name}: {value} is above what has no class" for name, value in values.items() if value > 0]
    for pod in pods(objects):
        value = values.get(pod.spec.get("priorityClassName", ""), 0)
        if (value < 0) != (pod.labels.get("ray.io/node-type") == "worker"):
            found.append(f"{pod.name}: priority {value}")
    return found


def sizes_are_said_by_one(objects: list[Object]) -> list[str]:
    """Autoscaled groups say no replicas, which the next kubectl apply would set back; others do."""
    return [
        f"{' '.join(key(one))} {group['groupName']}: replicas {group.get('replicas')}"
        for one, cluster in clusters(objects)
        for group in cluster["workerGroupSpecs"]
        if ("replicas" in group) == bool(cluster.get("enableInTreeAutoscaling"))
    ]


RULES: tuple[Rule, ...] = (
    versions_are_those_installed, jobs_are_retried_and_resume, stopping_leaves_time, memory_is_reserved, volumes_in_memory_fit,
    memory_is_given_out_once, heads_run_no_tasks, sizes_are_said_by_one, nodes_are_in_no_subcluster, workers_only_on_spot_machines, kueue_takes_it,
    nobody_else_is_pushed_away,
)  # fmt: skip
