"""Each rule has manifests that break it: one change to an overlay that all rules accept, and that rule complains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from manifests import kuberay_rules as kuberay
from manifests import network, operation, programs, references, security
from manifests.render import Object
from manifests.schemas import findings

ALL = {"dev": ("dev", "dev/jobs"), "prod": ("prod", "prod/jobs"), "kueue": ("kueue", "kueue/jobs", "kueue/quota")}
GONE = object()
"""Stands for a field that is taken away."""
JOB, CLUSTER = "RayJob tat-train", "RayCluster interactive"
_HEAD = "spec.headGroupSpec"
_HEAD_POD = f"{_HEAD}.template.spec"
_DECODE = "spec.workerGroupSpecs.0"
_DECODE_POD = f"{_DECODE}.template.spec"
_MLFLOW = "spec.template.spec"
_QUOTA = "spec.resourceGroups.0"
TOKEN = "sec" + "ret"


@dataclass(frozen=True)
class Break:
    """A rule, and the fields of one object that break it: path -> value. overlay: of which it is."""

    rule: Callable[[list[Object]], list[str]]
    of: str
    fields: dict[str, Any]
    overlay: str = "prod"


BREAKS = (
    Break(kuberay.names_are_dns_1035_and_short, JOB, {"metadata.name": "4-jobs"}),
    Break(kuberay.names_are_dns_1035_and_short, JOB, {"metadata.name": "x" * 48}),
    Break(kuberay.names_are_dns_1035_and_short, CLUSTER, {"metadata.name": "x" * 54}),
    Break(kuberay.suspended_jobs_shut_their_cluster_down, JOB, {"spec.suspend": True, "spec.shutdownAfterJobFinishes": False}),
    Break(kuberay.suspended_jobs_shut_their_cluster_down, JOB, {"spec.suspend": True, "spec.clusterSelector": {"ray.io/cluster": "a"}}),
    Break(kuberay.ttl_needs_shutdown, JOB, {"spec.shutdownAfterJobFinishes": GONE}),
    Break(kuberay.ttl_needs_shutdown, JOB, {"spec.ttlSecondsAfterFinished": -1}),
    Break(kuberay.deletion_strategy_is_of_one_kind, JOB, {"spec.deletionStrategy": {}}),
    Break(kuberay.deletion_strategy_is_of_one_kind, JOB, {"spec.deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}}}),
    Break(
        kuberay.deletion_strategy_is_of_one_kind,
        JOB,
        {"spec.deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]}},
    ),
    Break(
        kuberay.deletion_strategy_is_of_one_kind,
        JOB,
        {
            "spec.shutdownAfterJobFinishes": False,
            "spec.deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 5}}]},
        },
    ),
    Break(kuberay.a_cluster_is_given_or_selected, JOB, {"spec.rayClusterSpec": GONE}),
    Break(kuberay.submission_mode_exists, JOB, {"spec.submissionMode": "K8SJobMode"}),
    Break(kuberay.retries_need_a_cluster_of_their_own, JOB, {"spec.clusterSelector": {"ray.io/cluster": "interactive"}}),
    Break(kuberay.retries_need_a_cluster_of_their_own, JOB, {"spec.submissionMode": "InteractiveMode"}),
    Break(kuberay.retries_need_a_cluster_of_their_own, JOB, {"spec.backoffLimit": -1}),
    Break(kuberay.sidecar_mode_has_no_submitter, JOB, {"spec.submissionMode": "SidecarMode"}),
    Break(kuberay.deadlines_are_positive, JOB, {"spec.activeDeadlineSeconds": 0}),
    Break(kuberay.runtime_environment_is_yaml, JOB, {"spec.runtimeEnvYAML": "env_vars: {"}),
    Break(kuberay.runtime_environment_is_yaml, JOB, {"spec.runtimeEnvYAML": "- a"}),
    Break(kuberay.manager_is_known, JOB, {"spec.managedBy": "me"}),
    Break(kuberay.manager_is_known, CLUSTER, {"spec.managedBy": "me"}),
    Break(kuberay.resources_are_said_once, CLUSTER, {f"{_HEAD}.resources": {"CPU": "1"}}),
    Break(kuberay.labels_are_in_their_field, CLUSTER, {f"{_DECODE}.rayStartParams.labels": "a=b"}),
    Break(kuberay.labels_are_in_their_field, CLUSTER, {f"{_DECODE}.labels": {"a b": "c"}}),
    Break(kuberay.groups_are_named_once_and_in_order, CLUSTER, {f"{_DECODE}.groupName": "gpu"}),
    Break(kuberay.groups_are_named_once_and_in_order, CLUSTER, {f"{_DECODE}.replicas": 3}),
    Break(kuberay.autoscaler_v2_replaces_pods, CLUSTER, {f"{_DECODE_POD}.restartPolicy": "Always"}),
    Break(kuberay.autoscaler_v2_replaces_pods, CLUSTER, {f"{_DECODE}.suspend": True}),
    Break(
        kuberay.autoscaler_v2_replaces_pods,
        CLUSTER,
        {f"{_HEAD_POD}.containers.0.env": [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]},
    ),
    Break(kuberay.token_needs_a_version, CLUSTER, {"spec.rayVersion": GONE}),
    Break(kuberay.token_needs_a_version, CLUSTER, {"spec.rayVersion": "2.51.0"}),
    Break(
        kuberay.fault_tolerance_is_in_its_field,
        CLUSTER,
        {f"{_HEAD_POD}.containers.0.env": [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}]},
    ),
    Break(kuberay.only_rayclusters_are_recreated, CLUSTER, {"spec.upgradeStrategy": {"type": "None"}}),
    Break(kuberay.only_rayclusters_are_recreated, JOB, {"spec.rayClusterSpec.upgradeStrategy": {"type": "Recreate"}}),
    Break(security.containers_are_locked_down, CLUSTER, {f"{_DECODE_POD}.containers.0.securityContext.runAsNonRoot": False}),
    Break(security.containers_are_locked_down, CLUSTER, {"spec.autoscalerOptions.securityContext": GONE}),
    Break(security.containers_are_locked_down, JOB, {"spec.submitterPodTemplate.spec.securityContext.seccompProfile": GONE}),
    Break(security.pods_share_nothing_with_their_machine, CLUSTER, {f"{_DECODE_POD}.hostNetwork": True}),
    Break(security.pods_share_nothing_with_their_machine, CLUSTER, {f"{_DECODE_POD}.volumes.1": {"name": "tmp", "hostPath": {"path": "/"}}}),
    Break(security.pods_share_nothing_with_their_machine, CLUSTER, {f"{_HEAD_POD}.containers.0.ports.0.hostPort": 6379}),
    Break(security.only_the_autoscaler_has_a_token, CLUSTER, {f"{_DECODE_POD}.automountServiceAccountToken": GONE}),
    Break(security.only_the_autoscaler_has_a_token, CLUSTER, {"spec.autoscalerOptions.volumeMounts": []}),
    Break(
        security.only_the_autoscaler_has_a_token,
        CLUSTER,
        {f"{_HEAD_POD}.containers.0.volumeMounts.0": {"name": "api-token", "mountPath": "/api"}},
    ),
    Break(security.only_the_autoscaler_has_a_token, "ServiceAccount mlflow", {"automountServiceAccountToken": True}),
    Break(security.no_secret_is_written_down, "ConfigMap storage", {"data.AWS_SECRET_ACCESS_KEY": TOKEN}),
    Break(security.no_secret_is_written_down, "ConfigMap settings", {"data.MLFLOW_TRACKING_URI": f"http://me:{TOKEN}@mlflow:5000"}),
    Break(security.no_secret_is_written_down, "Deployment mlflow", {f"{_MLFLOW}.containers.0.env": [{"name": "PGPASSWORD", "value": TOKEN}]}),
    Break(security.no_secret_is_written_down, "ConfigMap storage", {"kind": "Secret"}),
    Break(security.images_are_fixed, CLUSTER, {f"{_DECODE_POD}.containers.0.image": "slerp-tat"}),
    Break(security.images_are_fixed, CLUSTER, {f"{_DECODE_POD}.containers.0.image": "slerp-tat:latest"}),
    Break(security.clusters_ask_for_a_token, CLUSTER, {"spec.authOptions": GONE}),
    Break(security.clusters_ask_for_a_token, "ConfigMap settings", {"data.RAY_AUTH_MODE": "disabled"}),
    Break(security.nothing_is_exposed, CLUSTER, {f"{_HEAD}.serviceType": "LoadBalancer"}),
    Break(security.nothing_is_exposed, CLUSTER, {f"{_HEAD}.enableIngress": True}),
    Break(security.nothing_is_exposed, "Service mlflow", {"spec.type": "NodePort"}),
    Break(security.the_namespace_is_restricted, "Namespace slerp-tat", {"metadata.labels": {}}),
    Break(references.secrets_are_documented, CLUSTER, {f"{_HEAD_POD}.containers.0.envFrom.2.secretRef.name": "s4"}),
    Break(references.secrets_are_documented, "Deployment mlflow", {f"{_MLFLOW}.containers.0.env.4.valueFrom.secretKeyRef.key": "uri"}),
    Break(references.config_maps_exist, CLUSTER, {f"{_HEAD_POD}.volumes.2.configMap.name": "stop-job"}),
    Break(references.config_maps_exist, "ConfigMap storage", {"metadata.name": "store"}),
    Break(references.volumes_are_there_and_used, CLUSTER, {f"{_DECODE_POD}.volumes.1.name": "temp"}),
    Break(references.volumes_are_there_and_used, CLUSTER, {f"{_DECODE_POD}.containers.0.volumeMounts.1.mountPath": "/dev/shm"}),  # noqa: S108
    Break(references.volumes_are_there_and_used, "PersistentVolumeClaim mlflow", {"metadata.name": "other"}, "dev"),
    Break(references.accounts_and_classes_exist, CLUSTER, {f"{_DECODE_POD}.serviceAccountName": "default"}),
    Break(references.accounts_and_classes_exist, CLUSTER, {f"{_DECODE_POD}.priorityClassName": "high"}),
    Break(references.probes_have_their_port, CLUSTER, {f"{_DECODE_POD}.containers.0.livenessProbe": GONE}),
    Break(references.probes_have_their_port, "Deployment mlflow", {f"{_MLFLOW}.containers.0.readinessProbe.httpGet.port": "web"}),
    Break(references.services_lead_somewhere, "Service mlflow", {"spec.selector": {"app.kubernetes.io/name": "mlf"}}),
    Break(references.services_lead_somewhere, "Service mlflow", {"spec.ports.0.targetPort": "web"}),
    Break(references.addresses_are_services, "ConfigMap settings", {"data.MLFLOW_TRACKING_URI": "http://mlflow:5001"}),
    Break(references.addresses_are_services, "ConfigMap storage", {"data.AWS_ENDPOINT_URL": "http://weed:8333"}, "dev"),
    Break(references.budgets_fit, "PodDisruptionBudget embed-head", {"spec.selector.matchLabels": {"a": "b"}}),
    Break(references.budgets_fit, "PodDisruptionBudget embed-head", {"spec": {"maxUnavailable": 0, "selector": {}}}),
    Break(references.budgets_fit, "PodDisruptionBudget embed-head", {"spec.minAvailable": "100%"}),
    Break(references.budgets_fit, "PodDisruptionBudget embed-submitter", {"spec.selector.matchLabels": {"slerp-tat/role": "submitter"}}),
    Break(references.queues_exist, JOB, {"metadata.labels": {references.QUEUE: "other"}}, "kueue"),
    Break(references.queues_exist, "LocalQueue slerp-tat", {"spec.clusterQueue": "other"}, "kueue"),
    Break(references.queues_exist, "ClusterQueue slerp-tat", {f"{_QUOTA}.flavors.0.name": "other"}, "kueue"),
    Break(network.everything_is_denied_first, "NetworkPolicy default-deny", {"spec.policyTypes": ["Ingress"]}),
    Break(network.names_can_be_looked_up, "NetworkPolicy dns", {"spec.podSelector": {"matchLabels": {"ray.io/node-type": "head"}}}),
    Break(network.policies_meet_pods, "NetworkPolicy metrics", {"spec.podSelector": {"matchLabels": {"ray.io/node": "yes"}}}),
    Break(network.policies_meet_pods, "NetworkPolicy metrics", {"spec.ingress.0.ports.0.port": 8081}),
    Break(network.policies_meet_pods, "NetworkPolicy ray-to-mlflow", {"spec.egress.0.to.0.podSelector.matchLabels": {"app": "mlflow"}}),
    Break(operation.versions_are_those_installed, CLUSTER, {"spec.rayVersion": "2.59.0"}),
    Break(operation.versions_are_those_installed, CLUSTER, {f"{_HEAD_POD}.containers.0.image": "slerp-tat:0.0.9"}, "dev"),
    Break(operation.jobs_are_retried_and_resume, JOB, {"spec.backoffLimit": GONE}),
    Break(operation.jobs_are_retried_and_resume, JOB, {"spec.submitterConfig": {"backoffLimit": 2}}),
    Break(operation.jobs_are_retried_and_resume, JOB, {"spec.activeDeadlineSeconds": GONE}),
    Break(operation.jobs_are_retried_and_resume, JOB, {"spec.entrypoint": "python jobs/tat_train.py"}),
    Break(operation.stopping_leaves_time, "ConfigMap settings", {"data.RAY_JOB_STOP_SIGNAL": "SIGTERM"}),
    Break(operation.stopping_leaves_time, CLUSTER, {f"{_HEAD_POD}.terminationGracePeriodSeconds": 30}),
    Break(operation.stopping_leaves_time, CLUSTER, {f"{_HEAD_POD}.containers.0.lifecycle": GONE}),
    Break(operation.stopping_leaves_time, CLUSTER, {f"{_DECODE_POD}.containers.0.lifecycle": {"preStop": {"exec": {"command": ["ray", "stop"]}}}}),
    Break(operation.stopping_leaves_time, CLUSTER, {f"{_DECODE_POD}.terminationGracePeriodSeconds": 30}),
    Break(operation.memory_is_reserved, CLUSTER, {f"{_DECODE_POD}.containers.0.resources.requests.memory": "4Gi"}),
    Break(operation.memory_is_reserved, JOB, {"spec.submitterPodTemplate.spec.containers.0.resources": GONE}),
    Break(operation.volumes_in_memory_fit, CLUSTER, {f"{_DECODE}.rayStartParams.object-store-memory": "20000000000"}),
    Break(operation.volumes_in_memory_fit, CLUSTER, {f"{_DECODE_POD}.volumes.0.emptyDir.sizeLimit": "48Gi"}),
    Break(operation.volumes_in_memory_fit, CLUSTER, {f"{_DECODE_POD}.volumes.0.emptyDir.medium": GONE}),
    Break(operation.volumes_in_memory_fit, CLUSTER, {f"{_DECODE_POD}.volumes.1.emptyDir.sizeLimit": "100Gi"}),
    Break(operation.heads_run_no_tasks, CLUSTER, {f"{_HEAD}.rayStartParams.num-cpus": GONE}),
    Break(operation.heads_run_no_tasks, CLUSTER, {f"{_DECODE}.rayStartParams.num-cpus": "64"}),
    Break(operation.heads_run_no_tasks, CLUSTER, {f"{_DECODE_POD}.containers.0.resources.limits.cpu": "1500m"}),
    Break(operation.nodes_are_in_no_subcluster, CLUSTER, {f"{_DECODE}.labels": {"ray-subcluster": "decode"}}),
    Break(operation.sizes_are_said_by_one, CLUSTER, {f"{_DECODE}.replicas": 1}),
    Break(operation.sizes_are_said_by_one, CLUSTER, {f"{_DECODE}.replicas": GONE}, "dev"),
    Break(operation.workers_only_on_spot_machines, CLUSTER, {f"{_HEAD_POD}.tolerations": [{"key": "spot", "operator": "Exists"}]}),
    Break(operation.workers_only_on_spot_machines, CLUSTER, {f"{_DECODE_POD}.tolerations": GONE}),
    Break(operation.workers_only_on_spot_machines, CLUSTER, {f"{_HEAD_POD}.affinity": GONE}),
    Break(operation.workers_only_on_spot_machines, JOB, {"spec.submitterPodTemplate.spec.affinity": GONE}),
    Break(operation.nobody_else_is_pushed_away, "PriorityClass slerp-tat-head", {"value": 1000}),
    Break(operation.nobody_else_is_pushed_away, CLUSTER, {f"{_DECODE_POD}.priorityClassName": "slerp-tat-head"}),
    Break(operation.kueue_takes_it, JOB, {"spec.rayClusterSpec.enableInTreeAutoscaling": True, "spec.rayClusterSpec.autoscalerOptions": {}}, "kueue"),
    Break(operation.kueue_takes_it, JOB, {"spec.suspend": True}, "kueue"),
    Break(operation.kueue_takes_it, JOB, {"spec.rayClusterSpec.workerGroupSpecs.0.groupName": "submitter"}, "kueue"),
    Break(operation.kueue_takes_it, JOB, {"spec.rayClusterSpec.workerGroupSpecs.0.replicas": 0}, "kueue"),
    Break(programs.variables_are_read_by_someone, "ConfigMap settings", {"data.CIR_TAT_TRAIN_STORAGE": "s3://b/r"}),
    Break(programs.variables_are_read_by_someone, "ConfigMap settings", {"data.RAY_DATA_USE_DATASOURCE_V3": "0"}),
    Break(programs.entrypoints_parse, JOB, {"spec.entrypoint": "python jobs/tat_trian.py --name a"}),
    Break(programs.entrypoints_parse, JOB, {"spec.entrypoint": "python jobs/tat_train.py --name a --num_worker 2"}),
    Break(programs.entrypoints_parse, JOB, {"spec.entrypoint": "python jobs/tat_train.py --name a --num_workers '[8, 4]'"}),
    Break(programs.entrypoints_parse, "ConfigMap settings", {"data.CIR_EMBED_DTYPE": "int8"}),
    Break(programs.entrypoints_parse, "ConfigMap settings", {"data.CIR_TAT_TRAIN_STORAGE_PATH": "/tmp/runs"}),  # noqa: S108
    Break(programs.clusters_hold_their_job, JOB, {"spec.entrypoint": "python jobs/tat_train.py --name a --num_workers 9 --use_gpu true"}),
    Break(programs.clusters_hold_their_job, JOB, {"spec.entrypoint": "python jobs/tat_train.py --name a --num_workers 2"}),
    Break(programs.clusters_hold_their_job, "RayJob batch-retrieve", {"spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas": 7}),
    Break(operation.memory_is_given_out_once, CLUSTER, {f"{_DECODE}.rayStartParams.memory": "38000000000"}),
    Break(operation.memory_is_given_out_once, CLUSTER, {f"{_DECODE}.rayStartParams.memory": GONE}),
    Break(programs.clusters_hold_their_job, "RayJob embed", {"spec.rayClusterSpec.workerGroupSpecs.1.maxReplicas": 7}),
    Break(programs.queues_hold_their_jobs, "ClusterQueue slerp-tat", {f"{_QUOTA}.flavors.0.resources.3.nominalQuota": 8}, "kueue"),
    Break(programs.queues_hold_their_jobs, "ClusterQueue slerp-tat", {f"{_QUOTA}.flavors.0.resources.1.nominalQuota": "512Gi"}, "kueue"),
    Break(programs.queues_hold_their_jobs, "ClusterQueue slerp-tat", {f"{_QUOTA}.flavors.0.resources.2.name": "disk"}, "kueue"),
    Break(programs.quotas_cover_in_order, "ClusterQueue slerp-tat", {f"{_QUOTA}.coveredResources": ["memory", "cpu"]}, "kueue"),
)  # fmt: skip

AGAINST_SCHEMA = (
    Break(findings, CLUSTER, {f"{_DECODE}.replica": 1}),
    Break(findings, CLUSTER, {"spec.authOptions.mode": "tokens"}),
    Break(findings, CLUSTER, {f"{_DECODE_POD}.containers.0.resources.limit": {}}),
    Break(findings, CLUSTER, {"spec.headGroupSpec": GONE}),
    Break(findings, JOB, {"spec.backofLimit": 2}),
    Break(findings, JOB, {"spec.rayClusterSpec.rayversion": "2.60.0"}),
    Break(findings, JOB, {"spec.preRunningDeadlineSeconds": 0}),
    Break(findings, JOB, {"spec.submitterPodTemplate.spec.containers.0.ports": [{"port": 1}]}),
    Break(findings, "Deployment mlflow", {"spec.replica": 1}),
    Break(findings, "Deployment mlflow", {f"{_MLFLOW}.containers.0.image": 3}),
    Break(findings, "NetworkPolicy metrics", {"spec.ingres": []}),
    Break(findings, "PodDisruptionBudget embed-head", {"apiVersion": "policy/v2"}),
    Break(findings, "LocalQueue slerp-tat", {"spec.queue": "a"}, "kueue"),
    Break(findings, "ClusterQueue slerp-tat", {f"{_QUOTA}.flavors.0.resources.0.quota": 1}, "kueue"),
    Break(findings, "ClusterQueue slerp-tat", {"kind": "Cohort"}, "kueue"),
)


def changed(objects: list[Object], broken: Break) -> tuple[list[Object], Object]:
    """Return the objects with one of them changed, and that one."""
    copied = copy.deepcopy(objects)
    (one,) = (item for item in copied if f"{item['kind']} {item['metadata']['name']}" == broken.of)
    for path, value in broken.fields.items():
        node: Any = one
        *parents, last = path.split(".") if not path.startswith("data.") else ("data", path.removeprefix("data."))
        for part in parents:
            node = node[int(part) if isinstance(node, list) else part]
        if value is GONE:
            del node[last]
        else:
            node[int(last) if isinstance(node, list) else last] = value
    return copied, one


def label(broken: Break) -> str:
    return f"{broken.rule.__name__}-{next(iter(broken.fields)).rpartition('.')[2]}"


@pytest.mark.parametrize("broken", BREAKS, ids=label)
def test_what_breaks_a_rule_is_found(broken, rendered):
    objects = [one for part in ALL[broken.overlay] for one in rendered(part)]
    assert broken.rule(objects) == []
    assert broken.rule(changed(objects, broken)[0]) != []


@pytest.mark.parametrize("broken", AGAINST_SCHEMA, ids=label)
def test_what_the_schemas_refuse(broken, rendered):
    objects = [one for part in ALL[broken.overlay] for one in rendered(part)]
    assert findings(changed(objects, broken)[1]) != []


def test_every_rule_is_broken_once():
    rules = [rule for module in (kuberay, security, references, network, operation, programs) for rule in module.RULES]
    assert {broken.rule for broken in BREAKS} == set(rules)
    defined = [
        value
        for module in (kuberay, security, references, network, operation, programs)
        for name, value in vars(module).items()
        if callable(value)
        and getattr(value, "__annotations__", {}) == {"objects": "list[Object]", "return": "list[str]"}
    ]
    assert set(defined) == set(rules)
