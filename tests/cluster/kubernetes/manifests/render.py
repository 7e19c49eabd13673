"""What `kubectl kustomize` makes of our overlays, for machines without kubectl: the part of kustomize that our files use.

Whatever this does not know is an error (`UnsupportedError`), so a file that needs more cannot be rendered wrongly: it is
kept within this part, or the part is made larger. Where kubectl is installed, a test compares both.

Known: resources, components, patches (strategic merge of maps; JSON 6902 add, replace, remove, test), replacements of whole
fields, images, configMapGenerator without hash suffix, namespace, config.kubernetes.io/local-config.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
"""One Kubernetes object."""

CLUSTER_SCOPED = {"Namespace", "PriorityClass"}
_NOT_NAMESPACED = {"ClusterQueue", "ResourceFlavor"}  # kustomize cannot know, and would give them a namespace
_FIELDS = {
    "apiVersion", "kind", "namespace", "resources", "components", "patches", "replacements", "images", "configMapGenerator",
}  # fmt: skip
_KINDS = {"kustomize.config.k8s.io/v1beta1": "Kustomization", "kustomize.config.k8s.io/v1alpha1": "Component"}
_LOCAL = "config.kubernetes.io/local-config"


class UnsupportedError(Exception):
    """A file asks for something that kustomize may know and this renderer does not, or for what is not there."""


class _Loader(yaml.SafeLoader):
    """YAML in which a key occurs once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(map(str, keys))) < len(keys):
            raise UnsupportedError(f"a key occurs twice {node.start_mark}")
        return super().construct_mapping(node, deep)


def render(folder: Path) -> list[Object]:
    """Return the objects that the kustomization in `folder` makes."""
    objects = _build(folder, [], "Kustomization")
    return [one for one in objects if one["metadata"].get("annotations", {}).get(_LOCAL) != "true"]


def key(one: Object) -> tuple[str, str]:
    """Return kind and name: what identifies an object within one of our overlays."""
    return one["kind"], one["metadata"]["name"]


def load(path: Path) -> list[Any]:
    """Return the documents of a YAML file; aliases become copies."""
    with path.open(encoding="utf-8") as stream:
        return [copy.deepcopy(document) for document in yaml.load_all(stream, _Loader)]


def _build(folder: Path, objects: list[Object], kind: str) -> list[Object]:
    (rules,) = load(folder / "kustomization.yaml")
    _only(rules, _FIELDS, str(folder))
    if _KINDS.get(rules.get("apiVersion")) != kind or rules.get("kind") != kind:
        raise UnsupportedError(f"{folder}: {rules.get('apiVersion')} {rules.get('kind')} where a {kind} is expected")
    for name in rules.get("resources", []):
        path = folder / name
        objects = objects + (_build(path, [], "Kustomization") if path.is_dir() else _read(path))
    for name in rules.get("components", []):
        objects = _build(folder / name, objects, "Component")
    objects = objects + [_config_map(folder, item) for item in rules.get("configMapGenerator", [])]
    names = [key(one) for one in objects]
    if len(set(names)) < len(names):
        raise UnsupportedError(f"{folder}: defined twice: {sorted({name for name in names if names.count(name) > 1})}")
    for patch in rules.get("patches", []):
        _patch(folder, objects, patch)
    if "namespace" in rules:
        _set_namespace(objects, rules["namespace"])
    for image in rules.get("images", []):
        _set_image(objects, image)
    for replacement in rules.get("replacements", []):
        _replace(objects, replacement)
    return objects


def _only(found: Any, known: set[str], where: str) -> None:
    if not isinstance(found, dict) or not set(found) <= known:
        raise UnsupportedError(f"{where}: {sorted(set(found) - known) if isinstance(found, dict) else found!r}")


def _read(path: Path) -> list[Object]:
    objects = load(path)
    for one in objects:
        if not isinstance(one, dict) or not {"apiVersion", "kind", "metadata"} <= set(one):
            raise UnsupportedError(f"{path}: a document that is no Kubernetes object")
        if "namespace" in one["metadata"]:
            raise UnsupportedError(f"{path}: {key(one)} names its namespace; overlays do")
    return objects


def _config_map(folder: Path, item: Any) -> Object:
    _only(item, {"name", "files", "options"}, f"{folder}: configMapGenerator")
    if item.get("options") != {"disableNameSuffixHash": True}:
        raise UnsupportedError(f"{folder}: names with a hash would have to be found in the fields of Ray's kinds")
    data = {Path(name).name: (folder / name).read_text(encoding="utf-8") for name in item["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": item["name"]}, "data": data}


def _patch(folder: Path, objects: list[Object], patch: Any) -> None:
    _only(patch, {"path", "target", "patch"}, f"{folder}: patches")
    text = (folder / patch["path"]).read_text(encoding="utf-8") if "path" in patch else patch["patch"]
    change = copy.deepcopy(yaml.load(text, _Loader))  # noqa: S506 - a SafeLoader
    if isinstance(change, list):
        for one in _selected(objects, patch.get("target")):
            for operation in change:
                _operate(one, operation)
    elif "target" in patch:
        raise UnsupportedError(f"{folder}: a strategic merge names its object itself")
    else:
        (one,) = _selected(objects, {"kind": change["kind"], "name": change["metadata"]["name"]})
        _merge(one, change)


def _selected(objects: list[Object], target: Any) -> list[Object]:
    """Return the objects of a kind, or the one of a kind and name; none is an error."""
    _only(target, {"kind", "name"}, "target")
    if not all(re.fullmatch(r"[\w-]+", value) for value in target.values()):
        raise UnsupportedError(f"target {target}: kustomize reads patterns")
    found = [
        one
        for one in objects
        if one["kind"] == target["kind"] and target.get("name") in (None, one["metadata"]["name"])
    ]
    if not found:
        raise UnsupportedError(f"nothing matches {target}")
    return found


def _merge(into: Object, change: Object) -> None:
    for name, value in change.items():
        if value is None or isinstance(value, list) or name.startswith("$"):
            raise UnsupportedError(f"strategic merge of {name!r}: only maps are merged here; use a JSON 6902 patch")
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _operate(one: Object, operation: Any) -> None:
    """Apply one operation of RFC 6902."""
    _only(operation, {"op", "path", "value"}, f"patch of {key(one)}")
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    node: Any = one
    try:
        for part in parents:
            node = node[int(part) if isinstance(node, list) else part]
        _at(node, last, operation["op"], copy.deepcopy(operation.get("value")))
    except (LookupError, ValueError, TypeError) as error:
        raise UnsupportedError(
            f"patch of {key(one)}: no {operation['path']} to {operation['op']} ({error!r})"
        ) from None


def _at(node: Any, last: str, op: str, value: Any) -> None:
    place: Any = last if isinstance(node, dict) else len(node) if last == "-" else int(last)
    if op == "add":
        node.insert(place, value) if isinstance(node, list) else node.__setitem__(place, value)
    elif op == "replace":
        node[place]  # must be there
        node[place] = value
    elif op == "remove":
        del node[place]
    elif op == "test":
        if node[place] != value:
            raise ValueError(f"{node[place]!r} is not {value!r}")
    else:
        raise UnsupportedError(f"operation {op!r}")


def _set_namespace(objects: list[Object], namespace: str) -> None:
    for one in objects:
        if one["kind"] in _NOT_NAMESPACED or "Role" in one["kind"]:
            raise UnsupportedError(f"{key(one)} under a namespace: kustomize would give it one, or change its subjects")
        if one["kind"] == "Namespace":
            one["metadata"]["name"] = namespace
        elif one["kind"] not in CLUSTER_SCOPED:
            one["metadata"]["namespace"] = namespace


def _set_image(objects: list[Object], image: Any) -> None:
    _only(image, {"name", "newName", "newTag", "digest"}, "images")
    for container in _containers(objects):
        name, _, _ = container["image"].partition("@")[0].partition(":")
        if name == image["name"]:
            version = f"@{image['digest']}" if "digest" in image else f":{image['newTag']}"
            container["image"] = image.get("newName", name) + version


def _containers(node: Any) -> Iterator[Object]:
    for name, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if name in ("containers", "initContainers"):
            yield from child
        else:
            yield from _containers(child)


def _replace(objects: list[Object], replacement: Any) -> None:
    """Copy a whole field of one object to a field of others, made if absent."""
    _only(replacement, {"source", "targets"}, "replacements")
    path = replacement["source"].pop("fieldPath")
    (source,) = _selected(objects, replacement["source"])
    value: Any = source
    for part in path.split("."):
        value = value[part]
    for target in replacement["targets"]:
        _only(target, {"select", "fieldPaths", "options"}, "replacements")
        if target.get("options") != {"create": True} or "[" in "".join(target["fieldPaths"]):
            raise UnsupportedError("replacements: options are {create: true}, and fields are named plainly")
        for one in _selected(objects, target["select"]):
            for place in target["fieldPaths"]:
                node: Any = one
                *parents, last = place.split(".")
                for part in parents:
                    node = node.setdefault(part, {})
                node[last] = copy.deepcopy(value)
