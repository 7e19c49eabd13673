"""The example for `ray up` and the commands of cluster/README.md: what Ray's own schema and command line take."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path

import click
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
README = (CLUSTER / "README.md").read_text(encoding="utf-8")
VMS = yaml.safe_load((CLUSTER / "vms" / "cluster.yaml").read_text())
STARTS = [
    *re.findall(r"^(ray start .*)$", README, re.MULTILINE),
    *(
        found
        for part in ("head", "worker")
        for line in VMS[f"{part}_start_ray_commands"]
        for found in re.findall(r"ray start .*", line)
    ),
]


def test_ray_s_schema_takes_the_example():
    prepared = prepare_config(copy.deepcopy(VMS))  # as `ray up` does: AWS' defaults filled in
    validate_config(prepared)
    assert VMS["available_node_types"].keys() == prepared["available_node_types"].keys()


@pytest.mark.parametrize(
    "change",
    [
        {"max_worker": 3},
        {"provider": {"region": "eu-central-1"}},
        {"available_node_types": {"head": {"node_config": {}, "resources": {"CPU": -1}}}},
        {"file_mounts": ["."]},
    ],
)
def test_ray_s_schema_refuses_mistakes(change):
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config({**prepare_config(copy.deepcopy(VMS)), **change})


def test_head_and_workers_are_what_the_jobs_expect():
    kinds = VMS["available_node_types"]
    assert VMS["head_node_type"] in kinds
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert {kind["labels"]["slerp-tat/pool"] for kind in kinds.values() if "labels" in kind} == {"decode", "gpu"}
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) <= VMS["max_workers"]
    assert VMS["provider"]["use_internal_ips"] is False  # reached by SSH alone; ports are Ray's security group's


@pytest.mark.parametrize("command", STARTS)
def test_ray_start_knows_every_option(command):
    arguments = shlex.split(command, comments=True)[2:]
    found = scripts.start.make_context("ray start", arguments).params
    assert found["head"] or found["address"].endswith(":6379")
    assert found["dashboard_host"] in (None, "localhost", "127.0.0.1")


def test_ray_start_refuses_what_it_does_not_know():
    with pytest.raises(click.UsageError):
        scripts.start.make_context("ray start", ["--head", "--dashboard-hosts=127.0.0.1"])


def test_every_command_asks_for_a_token():
    assert len(STARTS) == 4
    for part in ("head", "worker"):
        assert any("RAY_AUTH_MODE=token" in line for line in VMS[f"{part}_start_ray_commands"])
    assert "~/.ray/auth_token" in VMS["file_mounts"]
    assert "export RAY_AUTH_MODE=token" in README


def test_links_lead_somewhere():
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", README)]
    files = [target for target in links if Path(target).suffix]
    assert len(files) >= 5
    assert [target for target in files if not (CLUSTER / target).is_file()] == []
