"""The rules of the Dockerfile, each broken once; what goes into a build, and what comes out as /app."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths
from dockerfile import TARGETS, findings, image, lineage

NOT_OPENED = {"jobs/BENCHMARKS.md"}
"""Files that no job opens; so are those in C once they are compiled."""
NEVER_SENT = [
    ".git/config", ".env", ".venv/bin/python", ".run/cluster.json", "requirements.txt", "tests/test_x.py", "Makefile",
    "cluster/kubernetes/base/settings.yaml", "cluster/image/Dockerfile", "cluster/image/keys/id.txt", "jobs/.env",
    "keys.json", "cir_core/__pycache__/schema.cpython-311.pyc", "cir_core/search/_kernels.cpython-311-x86_64-linux-gnu.so",
    "slerp_tat.egg-info/PKG-INFO", "build/lib/cir_core/schema.py",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(image_folder) -> str:
    return (image_folder / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def sources(root) -> set[str]:
    """Every file of the two packages, compiled ones aside."""
    return {
        str(path.relative_to(root))
        for package in ("cir_core", "jobs")
        for path in (root / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }


def test_the_dockerfile_keeps_its_rules(text):
    assert findings(text) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("USER 1000:1000", "USER root", "is not a number, or is root"),
        ("USER 1000:1000", "USER ray", "is not a number, or is root"),
        ("USER 1000:1000\n", "", "is not a number, or is root"),
        ("FROM runtime AS gpu\n", "FROM runtime AS gpu\nUSER 0:0\n", "is not a number, or is root"),
        ("COPY --from=code", "ADD --from=code", "COPY says what it does"),
        ("COPY jobs jobs", "ADD https://example.com/jobs.tar jobs", "COPY says what it does"),
        ("COPY jobs jobs", "COPY . .", "a whole tree"),
        ("COPY jobs jobs", "RUN curl -s https://example.com/x | sh", "not pinned"),
        ("python:3.11-slim-bookworm", "python:latest", "names no version"),
        ("python:3.11-slim-bookworm", "python", "names no version"),
        ("FROM ${BASE_IMAGE} AS build", "FROM debian:bookworm AS build", "not from the one base"),
        ("    PYTHONUNBUFFERED=1", "    AWS_SESSION=x", "looks like a secret"),
        ("ARG UV_VERSION=", "ARG HF_TOKEN\nARG UV_VERSION=", "looks like a secret"),
        ("ca-certificates libgomp1", "gcc libgomp1", "what only a build needs: gcc"),
        ("FROM runtime AS cpu", "FROM code AS cpu", "what only a build needs: gcc"),
        ("&& rm -rf /var/lib/apt/lists/* /var/log", "&& rm -rf /var/log", "package lists"),
        ("COPY --from=cpu-packages /opt/venv /opt/venv\nCOPY --from=code /app /app",
         "COPY --from=code /app /app\nCOPY --from=cpu-packages /opt/venv /opt/venv", "first the packages"),
        ("WORKDIR /app", "WORKDIR /srv", "does not start in /app"),
        ("PYTHONPATH=/app", "PYTHONPATH=/srv", "does not find"),
        ("PATH=/opt/venv/bin:${PATH}", "PATH=${PATH}", "does not find"),
    ],
)  # fmt: skip
def test_each_rule_broken_once(text, old, new, message):
    assert old in text
    assert any(message in line for line in findings(text.replace(old, new)))


def test_packages_come_from_wheels_and_leave_no_cache(stages):
    installs = [rest for stage in stages.values() for rest in stage.values("RUN") if "uv pip install" in rest]
    assert len(installs) == 4
    for rest in installs:
        cached = "--no-cache" in rest or rest.startswith("--mount=type=cache,target=/root/.cache/uv")
        assert cached, rest
        assert "--no-deps" in rest
        assert (
            "--no-build " in rest or "--no-build-isolation" in rest
        )  # the second is our own code, without its own download


@pytest.mark.parametrize("target", TARGETS)
def test_bytecode_of_all_that_an_image_runs_is_compiled_and_not_looked_at_twice(stages, target):
    """Nothing can be compiled later: the root file system is read-only."""
    copied_from = [rest.split()[0].removeprefix("--from=") for rest in image(stages, target).values("COPY")]
    assert copied_from == [f"{target}-packages", "code"]
    for stage, what in (("runtime", "stdlib"), (f"{target}-packages", "/opt/venv"), ("code", "/app")):
        compiled = [rest for rest in stages[stage].values("RUN") if "-m compileall" in rest]
        assert len(compiled) == 1
        after = compiled[0].partition("-m compileall")[2]
        assert what in after
        assert "--invalidation-mode unchecked-hash" in after


def test_a_new_commit_changes_no_layer_with_packages(stages):
    for target in TARGETS:
        for stage in [*lineage(stages, f"{target}-packages"), stages["runtime"]]:
            assert "REVISION" not in stage.settings("ARG")
            assert not any(re.search(r"cir_core|jobs|pyproject", rest) for rest in stage.values("COPY"))


def test_what_is_sent_to_the_build(root, sources, stages, tmp_path):
    copied = {path for stage in stages.values() for rest in stage.values("COPY") for path in rest.split()[:-1]}
    files = {path for path in copied if not path.startswith("--from=") and (root / path).is_file()}
    wanted = sources | files
    for path in [*wanted, *NEVER_SENT, "README.md"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    patterns = [line for line in (root / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    sent = {path for path in exclude_paths(str(tmp_path), patterns) if (tmp_path / path).is_file()}
    assert sent - {"Dockerfile", ".dockerignore"} == wanted


def test_everything_that_is_copied_is_what_the_jobs_need_at_run_time(root, stages, sources, tmp_path):
    """Package data too: the wheel, without the compiled part, made of what the stage copies and of nothing else."""
    for rest in stages["code"].values("COPY"):
        for path in rest.split()[:-1]:
            (tmp_path / path).symlink_to(root / path)
    subprocess.run(
        [sys.executable, "-c", "import setuptools; setuptools.setup(ext_modules=[])", "build_py", "--build-lib", "app"],
        cwd=tmp_path, check=True, capture_output=True, timeout=100,
    )  # fmt: skip
    app = tmp_path / "app"
    built = {str(path.relative_to(app)) for path in app.rglob("*") if path.is_file()}
    assert {path for path in sources - NOT_OPENED if not path.endswith((".c", ".h"))} - built == set()
    assert built <= sources - NOT_OPENED


def test_the_build_fails_without_the_compiled_loops(root, stages):
    extension = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    assert extension["optional"]  # so setuptools goes on without them
    run = next(rest for rest in stages["code"].values("RUN") if "uv pip install" in rest)
    path = "/app/" + extension["name"].replace(".", "/")
    assert f"&& ls {path}*.so &&" in run


def test_make_image_builds_the_names_of_the_manifests(root, project, tmp_path):
    tool = tmp_path / "buildah"
    tool.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$0.log"\n')
    tool.chmod(0o755)
    environment = dict(os.environ, PATH=f"{tmp_path}:/usr/bin:/bin", IMAGE_TOOL="buildah", TARGETS="")
    command = ["make", "image", "ARGS=--pull-never"]
    subprocess.run(command, cwd=root, check=True, env=environment, capture_output=True, timeout=60)
    calls = Path(f"{tool}.log").read_text().splitlines()
    for call, target, name in zip(calls, TARGETS, ("slerp-tat", "slerp-tat-gpu"), strict=True):
        assert call.startswith(
            f"build --file cluster/image/Dockerfile --target {target} --tag {name}:{project['version']} "
        )
        assert call.endswith(" --pull-never .")


def test_make_image_says_what_is_missing(root, tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(Path("/usr/bin") / name)
    environment = {"PATH": str(tmp_path)}
    script = [str(tmp_path / "bash"), "cluster/image/build.sh"]
    done = subprocess.run(script, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no docker, podman or buildah that works was found; install one, or set IMAGE_TOOL" in done.stderr
    environment["IMAGE_TOOL"] = "podman"
    done = subprocess.run(script, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: IMAGE_TOOL is 'podman', which is not installed\n")
