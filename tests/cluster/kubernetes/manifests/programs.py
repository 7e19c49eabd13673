"""What runs in the pods: entrypoints that parse with the job's own settings, variables that somebody reads, and enough of everything."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from manifests.kuberay_rules import Rule
from manifests.references import QUEUE
from manifests.render import Object, key
from manifests.workloads import of_kind, pods, quantity

from cir_core.schema import CirError
from jobs.batch_retrieve import BatchRetrieveConfig
from jobs.config import parse_config
from jobs.decoding import embedding_resources
from jobs.embed import EmbedConfig
from jobs.tat_train import TatTrainConfig

ROOT = Path(__file__).resolve().parents[4]
_MODELS: dict[str, Any] = {"tat_train": TatTrainConfig, "embed": EmbedConfig, "batch_retrieve": BatchRetrieveConfig}
_READING_CPUS = 1.0  # READER_CPUS + DECODER_CPUS of jobs/training_data.py, which imports too much; a test compares

# Variables and a source file of the package that reads them (its name stands in there).
_READ_BY = {
    "RAY_USAGE_STATS_ENABLED": "ray/_common/usage/usage_constants.py",
    "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "ray/dashboard/modules/reporter/reporter_agent.py",
    "RAY_TRAIN_V2_ENABLED": "ray/train/v2/_internal/constants.py",
    "RAY_DATA_USE_DATASOURCE_V2": "ray/data/context.py",
    "RAY_JOB_STOP_SIGNAL": "ray/dashboard/modules/job/job_supervisor.py",
    "RAY_JOB_STOP_WAIT_TIME_S": "ray/dashboard/modules/job/job_supervisor.py",
    "MLFLOW_TRACKING_URI": "mlflow/environment_variables.py",
    "MLFLOW_DISABLE_TELEMETRY": "mlflow/environment_variables.py",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "mlflow/environment_variables.py",
    "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow/environment_variables.py",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "mlflow/environment_variables.py",
    "MLFLOW_AUTH_CONFIG_PATH": "mlflow/environment_variables.py",
    "MLFLOW_BACKEND_STORE_URI": "mlflow/cli/__init__.py",
    "HF_HOME": "huggingface_hub/constants.py",
    "MPLCONFIGDIR": "matplotlib/__init__.py",
    "AWS_EC2_METADATA_DISABLED": "botocore/utils.py",
    "AWS_ENDPOINT_URL": "botocore/configprovider.py",
}
_BY_ANYONE = {
    "HOME",
    "GOMEMLIMIT",
    "AWS_REGION",
}  # the system, Go's runtime, the AWS library that pyarrow is built with


def environment(objects: list[Object]) -> dict[str, str]:
    """Return what the ConfigMaps give to every Ray container, so to every driver."""
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(objects, "ConfigMap")}
    return {**maps["settings"], **maps["storage"]}


@cache
def _source(file: str) -> str:
    package, _, path = file.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return ""
    source = Path(found.submodule_search_locations[0]) / path
    return source.read_text(encoding="utf-8") if source.exists() else ""


def variables_are_read_by_someone(objects: list[Object]) -> list[str]:
    """A CIR_ variable sets a field of a job; any other stands in the source of the package that it is for."""
    names = {
        name for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"] != "stop-jobs" for name in one["data"]
    }
    names |= {item["name"] for pod in pods(objects) for one in pod.containers for item in one.get("env", [])}
    found = []
    for name in names - _BY_ANYONE:
        job = next((job for job in _MODELS if name.startswith(f"CIR_{job.upper()}_")), None)
        if job is not None:
            known = name.removeprefix(f"CIR_{job.upper()}_").lower() in _MODELS[job].model_fields
        else:
            known = name in _READ_BY and re.search(
                rf"\b{name}\b|{name.removeprefix('AWS_').lower()}", _source(_READ_BY[name])
            )
        found += [] if known else [f"nobody reads {name}"]
    return found


def settings(objects: list[Object], job: Object) -> Any:
    """Return the settings that a RayJob's entrypoint makes of its words and the ConfigMaps.

    Raises:
        CirError: the job itself would refuse them.
    """
    interpreter, script, *words = shlex.split(job["spec"]["entrypoint"])
    name = Path(script).stem
    if interpreter != "python" or name not in _MODELS or not (ROOT / script).exists():
        raise CirError(f"{job['spec']['entrypoint']!r} runs none of our jobs")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment(objects).items():
            patch.setenv(variable, value)
        return parse_config(_MODELS[name], name, "", words)


def entrypoints_parse(objects: list[Object]) -> list[str]:
    """Each is one of our scripts with settings that it takes, and writes where all nodes see it."""
    found = []
    for one in of_kind(objects, "RayJob"):
        try:
            config = settings(objects, one)
        except CirError as error:
            found.append(f"{' '.join(key(one))}: {error}")
            continue
        places = [config.storage_path, getattr(config, "output", "") or config.storage_path]
        found += [f"{' '.join(key(one))}: {place!r} is on one machine" for place in places if "://" not in place]
    return found


def _demand(config: Any) -> tuple[dict[str, float], tuple[int, float]]:
    """Return the CPUs and GPUs that a job asks for at once, its shares of a gallery and the most bytes of one."""
    if isinstance(config, TatTrainConfig):
        most = config.num_workers[1] if isinstance(config.num_workers, tuple) else config.num_workers
        needed = {"CPU": config.cpus_per_worker * most + _READING_CPUS, "GPU": most * config.use_gpu}
        return needed, (0, 1.0)
    needed = {"GPU": 0.0, **embedding_resources(config.num_encoders, use_gpu=config.use_gpu)}
    searches = isinstance(config, BatchRetrieveConfig)
    return needed, (config.num_shards, config.search_memory_gb * 1e9) if searches else (0, 1.0)


def clusters_hold_their_job(objects: list[Object]) -> list[str]:
    """Fully grown, the workers have the CPUs, GPUs and memory that the entrypoint's settings ask for."""
    found = []
    for one in of_kind(objects, "RayJob"):
        try:
            needed, searching = _demand(settings(objects, one))
        except CirError:
            continue  # told by entrypoints_parse
        workers = [pod for pod in pods([one]) if pod.labels.get("ray.io/node-type") == "worker"]
        cpus = sum(_limit(pod.main, "cpu") * pod.count for pod in workers)
        gpus = sum(_limit(pod.main, "nvidia.com/gpu") * pod.count for pod in workers)
        groups = {group["groupName"]: group for group in one["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
        room = {name: float(group["rayStartParams"]["memory"]) for name, group in groups.items()}
        shares, size = searching
        places = sum(room[pod.group] // size * pod.count for pod in workers if not _limit(pod.main, "nvidia.com/gpu"))
        for name, need, has in (
            ("CPU", needed["CPU"], cpus),
            ("GPU", needed["GPU"], gpus),
            ("places for a share", shares, places),
        ):
            found += [f"{' '.join(key(one))}: needs {need:g} {name}, may have {has:g}"] if need > has else []
        if gpus and not needed["GPU"]:
            found.append(f"{' '.join(key(one))}: GPUs that nothing uses")
    return found


def _limit(container: Object, resource: str) -> float:
    return float(quantity(container["resources"]["limits"].get(resource, 0)))


def _asked(one: Object) -> dict[str, Decimal]:
    """Return what Kueue counts for a workload: the requests of all its pods, the submitter's as well."""
    of_it = pods([one])
    names = {name for pod in of_it for container in pod.containers for name in container["resources"]["requests"]}
    return {name: sum((pod.amount(name) * pod.count for pod in of_it), Decimal(0)) for name in names}


def _quotas(objects: list[Object]) -> Iterator[tuple[str, dict[str, Decimal]]]:
    for queue in of_kind(objects, "LocalQueue"):
        for one in of_kind(objects, "ClusterQueue"):
            if one["metadata"]["name"] == queue["spec"]["clusterQueue"]:
                groups = one["spec"]["resourceGroups"]
                flavors = [item for group in groups for flavor in group["flavors"] for item in flavor["resources"]]
                yield queue["metadata"]["name"], {item["name"]: quantity(item["nominalQuota"]) for item in flavors}


def queues_hold_their_jobs(objects: list[Object]) -> list[str]:
    """Each job fits into its queue beside the interactive cluster, and every resource it asks for is covered."""
    found = []
    for queue, quota in _quotas(objects):
        inside = [one for one in objects if one["metadata"].get("labels", {}).get(QUEUE) == queue]
        always: dict[str, Decimal] = {}
        for one in of_kind(inside, "RayCluster"):
            always = {name: always.get(name, Decimal(0)) + amount for name, amount in _asked(one).items()}
        for one in of_kind(inside, "RayJob"):
            for name, amount in _asked(one).items():
                together = amount + always.get(name, Decimal(0))
                if together > quota.get(name, Decimal(-1)):
                    found.append(f"{' '.join(key(one))}: {name} {together:g} of {quota.get(name, 'no quota')}")
    return found


def quotas_cover_in_order(objects: list[Object]) -> list[str]:
    """Each flavor lists the covered resources, in their order: Kueue refuses it otherwise."""
    return [
        f"{' '.join(key(one))}: {flavor['name']}"
        for one in of_kind(objects, "ClusterQueue")
        for group in one["spec"]["resourceGroups"]
        for flavor in group["flavors"]
        if [item["name"] for item in flavor["resources"]] != group["coveredResources"]
    ]


RULES: tuple[Rule, ...] = (
    variables_are_read_by_someone, entrypoints_parse, clusters_hold_their_job, queues_hold_their_jobs, quotas_cover_in_order,
)  # fmt: skip
