"""Every overlay, whole, against every schema and rule; who may reach whom; what is written down in README.md."""

from __future__ import annotations

import re

import pytest
from manifests import kuberay_rules, network, operation, programs, references, security
from manifests.render import Object
from manifests.schemas import cel_rules, findings

ALL = {
    "dev": ("dev", "dev/jobs"),
    "prod": ("prod", "prod/jobs"),
    "kueue": ("kueue", "kueue/jobs", "kueue/quota"),
}
"""What stands in a cluster together."""
RULES = [
    rule for module in (kuberay_rules, security, references, network, operation, programs) for rule in module.RULES
]

BETWEEN_PODS = {
    *((one, two, port) for one in ("head", "worker") for two in ("head", "worker")
      for port in ("metrics", "agent", network.ANY)),
    *((one, "head", port) for one in ("head", "worker") for port in ("gcs-server", "dashboard")),
    ("submitter", "head", "dashboard"),
    ("operator", "head", "dashboard"),
    ("prometheus", "head", "metrics"),
    ("prometheus", "worker", "metrics"),
    ("head", "mlflow", "http"),
    ("worker", "mlflow", "http"),
}  # fmt: skip
TO_SEAWEEDFS = {(one, "seaweedfs", "s3") for one in ("head", "worker", "mlflow")}
TO_THE_WORLD = {(one, "0.0.0.0/0", 443) for one in ("head", "worker", "mlflow")} | {("mlflow", "192.0.2.2/32", 5432)}


@pytest.fixture(params=ALL)
def name(request) -> str:
    return request.param


@pytest.fixture
def objects(name, rendered) -> list[Object]:
    return [one for part in ALL[name] for one in rendered(part)]


def test_schemas(objects):
    assert [line for one in objects for line in findings(one)] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules(objects, rule):
    assert rule(objects) == []


def test_every_rule_of_the_crds_in_cel_is_mirrored():
    assert cel_rules() == set(kuberay_rules.CEL)


def test_who_reaches_whom_and_nobody_else(name, objects):
    expected = BETWEEN_PODS | (TO_SEAWEEDFS if name == "dev" else set())
    assert network.reach(objects) == expected


def test_what_leaves_the_cluster(name, objects):
    api_server = {("head", "192.0.2.1/32", 443), ("head", "192.0.2.1/32", 6443)}
    expected = {"dev": set(), "kueue": TO_THE_WORLD, "prod": TO_THE_WORLD | api_server}
    assert network.leaves(objects) == expected[name]


def test_what_must_be_filled_in_is_in_the_readme(rendered):
    """Placeholders: documentation's addresses and names, a digest and an account of zeros, the bucket called bucket."""
    pattern = re.compile(
        r"registry\.example\.com|sha256:0{64}|192\.0\.2\.\d+|arn:aws:iam::0{12}:role/[\w-]+|s3://bucket\b|eu-central-1"
    )
    used = {hit for part in ALL["prod"] + ALL["kueue"] for one in rendered(part) for hit in pattern.findall(str(one))}
    readme = references.README.read_text(encoding="utf-8")
    assert {hit for hit in used if hit not in readme.replace("sha256:00...", "sha256:" + "0" * 64)} == set()
    assert not any(pattern.search(str(one)) for part in ALL["dev"] for one in rendered(part))


def test_secrets_of_the_readme_are_used(rendered):
    used = {
        name
        for overlay in ALL.values()
        for pod in references.pods([one for part in overlay for one in rendered(part)])
        for name, _ in references.secret_references(pod)
    }
    assert used == set(references.documented_secrets())


def test_the_sum_of_reading_and_decoding_is_training_data_s():
    text = (programs.ROOT / "jobs" / "training_data.py").read_text()
    parts = [float(found) for found in re.findall(r"^(?:READER|DECODER)_CPUS = ([\d.]+)", text, re.MULTILINE)]
    assert len(parts) == 2
    assert sum(parts) == programs._READING_CPUS


def test_the_label_that_must_not_be_used_is_ray_data_s():
    source = programs._source("ray/data/_internal/cluster_autoscaler/default_autoscaling_coordinator.py")
    assert f'SUBCLUSTER_LABEL_KEY: LabelKey = "{operation.SUBCLUSTER}"' in source


def test_the_sizes_of_the_readme_are_those_of_prod(rendered):
    readme = references.README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (head|decode|gpu) \| (\d+) \| (\d+) GiB \| (\d+) GiB \|", readme, re.MULTILINE)
    found = set()
    for pod in references.pods(rendered("prod")):
        if pod.group:
            limits = pod.main["resources"]["limits"]
            (shared,) = (one["emptyDir"] for one in pod.spec["volumes"] if one["name"] == "shared-memory")
            sizes = (limits["memory"], shared["sizeLimit"])
            found.add((pod.group, limits["cpu"], *(size.removesuffix("Gi") for size in sizes)))
    assert found == set(rows)


def test_the_arithmetic_of_the_readme_is_right():
    readme = references.README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| [A-Z]\d+ \| (\d+) \| (\d+) \| ([\d.]+) \|$", readme, re.MULTILINE)
    assert len(rows) == 3
    for peak, images, cores in rows:
        assert float(images) == pytest.approx(0.4 * float(peak) * 1e12 / 162e9, rel=0.01)
        assert float(cores) == pytest.approx(float(images) / 630, abs=0.05)
