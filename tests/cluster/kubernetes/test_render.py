"""Our renderer does what kubectl does with our files, and refuses what it does not know."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from manifests.render import UnsupportedError, key, render

OVERLAYS = Path(__file__).resolve().parents[3] / "cluster" / "kubernetes" / "overlays"
HEAD = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
CONFIG = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: one}\ndata: {a: '1', b: '2'}\n"
TOP = ("dev", "dev/jobs", "prod", "prod/jobs", "kueue", "kueue/jobs", "kueue/quota", "../observability")


def kustomization(folder: Path, rules: str, *, objects: str = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "objects.yaml").write_text(objects)
    (folder / "kustomization.yaml").write_text(HEAD + "resources: [objects.yaml]\n" + rules)
    return folder


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("overlay", TOP)
def test_kubectl_renders_the_same(overlay, rendered):
    done = subprocess.run(
        ["kubectl", "kustomize", str(OVERLAYS / overlay)], capture_output=True, text=True, check=True, timeout=120
    )
    theirs = {key(one): one for one in yaml.safe_load_all(done.stdout)}
    assert theirs == {key(one): one for one in rendered(overlay)}
    assert "deprecated" not in done.stderr


def test_every_kustomization_is_part_of_an_overlay_that_is_rendered():
    base = OVERLAYS.parent
    found = {str(path.parent.relative_to(base)) for path in base.rglob("kustomization.yaml")}
    used, waiting = set(), [str((OVERLAYS / name).resolve().relative_to(base)) for name in TOP]
    while waiting:
        name = waiting.pop()
        used.add(name)
        rules = yaml.safe_load((base / name / "kustomization.yaml").read_text())
        children = [*rules.get("resources", []), *rules.get("components", [])]
        paths = [(base / name / child).resolve() for child in children]
        waiting += [str(path.relative_to(base)) for path in paths if path.is_dir()]
    assert used == found


def test_patches_images_namespace_and_replacements(tmp_path):
    objects = (
        CONFIG
        + "---\n"
        + "apiVersion: v1\nkind: Pod\nmetadata: {name: p, annotations: {config.kubernetes.io/local-config: 'true'}}\n"
        + "spec: {containers: [{name: c, image: 'app:1'}], initContainers: [{name: i, image: 'other:1'}]}\n"
        + "---\napiVersion: ray.io/v1\nkind: RayJob\nmetadata: {name: j}\n"
    )
    rules = """
namespace: here
patches:
  - patch: "{apiVersion: v1, kind: ConfigMap, metadata: {name: one}, data: {b: '3'}}"
  - target: {kind: ConfigMap, name: one}
    patch: "[{op: add, path: /data/x~1y, value: '4'}, {op: remove, path: /data/a}, {op: test, path: /data/b, value: '3'}]"
images: [{name: app, newName: r.example/app, digest: 'sha256:1'}]
replacements:
  - source: {kind: Pod, fieldPath: spec}
    targets: [{select: {kind: RayJob}, fieldPaths: [spec.deep.copy], options: {create: true}}]
"""
    config, job = render(kustomization(tmp_path / "k", rules, objects=objects))
    assert config["data"] == {"b": "3", "x/y": "4"}
    assert config["metadata"]["namespace"] == "here"
    assert [one["image"] for one in job["spec"]["deep"]["copy"]["containers"]] == ["r.example/app@sha256:1"]
    assert job["spec"]["deep"]["copy"]["initContainers"][0]["image"] == "other:1"


UNKNOWN = {
    "a field": "commonLabels: {a: b}",
    "a hash suffix": "configMapGenerator: [{name: a, files: [objects.yaml]}]",
    "a literal": "configMapGenerator: [{name: a, literals: [a=b], options: {disableNameSuffixHash: true}}]",
    "a list merged": "patches: [{patch: '{apiVersion: v1, kind: ConfigMap, metadata: {name: one}, data: {a: [1]}}'}]",
    "a deletion": "patches: [{patch: '{apiVersion: v1, kind: ConfigMap, metadata: {name: one}, data: {a: null}}'}]",
    "no such object": "patches: [{target: {kind: Secret}, patch: '[]'}]",
    "a pattern": "patches: [{target: {kind: ConfigMap, name: 'o.*'}, patch: '[]'}]",
    "a label selector": "patches: [{target: {kind: ConfigMap, labelSelector: a=b}, patch: '[]'}]",
    "an operation": "patches: [{target: {kind: ConfigMap}, patch: '[{op: move, path: /a, value: /b}]'}]",
    "no such place": "patches: [{target: {kind: ConfigMap}, patch: '[{op: replace, path: /data/z, value: a}]'}]",
    "a failed test": "patches: [{target: {kind: ConfigMap}, patch: '[{op: test, path: /data/a, value: z}]'}]",
    "an option of replacements": "replacements: [{source: {kind: ConfigMap, fieldPath: data}, targets: [{select: {kind: ConfigMap},"
    " fieldPaths: [x]}]}]",
    "a folder that is no component": "components: ['.']",
}


@pytest.mark.parametrize("rules", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_is_refused(tmp_path, rules):
    with pytest.raises(UnsupportedError):
        render(kustomization(tmp_path / "k", rules))


@pytest.mark.parametrize(
    "objects",
    [
        CONFIG + "---\n" + CONFIG,
        "a: 1\na: 2\n",
        "just: text\n",
        CONFIG.replace("{name: one}", "{name: one, namespace: n}"),
        "apiVersion: kueue.x-k8s.io/v1beta2\nkind: ClusterQueue\nmetadata: {name: q}\n",
    ],
    ids=["twice", "key twice", "no object", "own namespace", "cluster-scoped kind"],
)
def test_objects_that_kustomize_would_treat_otherwise_are_refused(tmp_path, objects):
    with pytest.raises(UnsupportedError):
        render(kustomization(tmp_path / "k", "namespace: here", objects=objects))


def test_what_linters_read_has_every_pod(tmp_path, rendered):
    script = Path(__file__).with_name("write_out.py")
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=120)
    found = [one for path in tmp_path.glob("*-pods.yaml") for one in yaml.safe_load_all(path.read_text())]
    # heads, submitters, decoders; GPU workers but in dev: of one interactive cluster and three jobs in three overlays
    assert len(found) == 3 * (4 + 3 + 4) + 2 * 4
    names = {container["name"] for one in found for container in one["spec"]["containers"]}
    assert names == {"ray-head", "autoscaler", "ray-worker", "ray-job-submitter"}
    assert len(list(yaml.safe_load_all((tmp_path / "dev.yaml").read_text()))) == len(rendered("dev"))
