"""Whether an object is what the API server takes: strict schemas of KubeRay, of Kueue and the Prometheus operator (what we use), of Kubernetes itself.

Each check returns its findings as lines; an empty list means that all is well.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator
from manifests.render import Object, key

SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
OLDEST, NEWEST = "1.31", "1.37"
"""Versions of Kubernetes: from the one in which all fields are on by default to the newest that has schemas."""
_FILES = {
    "ray.io/v1": "kuberay.json",
    "kueue.x-k8s.io/v1beta2": "kueue.json",
    "monitoring.coreos.com/v1": "monitoring.json",
}


@cache
def _schema(file: str) -> Any:
    return json.loads((SCHEMAS / file).read_text())


@cache
def _validator(file: str, kind: str) -> Draft202012Validator:
    schema = _schema(file)
    return Draft202012Validator({**schema["properties"][kind], "$defs": schema["$defs"]})


def findings(one: Object) -> list[str]:
    """Return what a strict API server would refuse: unknown fields, wrong types, what is missing."""
    where = " ".join(key(one))
    file = _FILES.get(one["apiVersion"])
    if file is None:
        text = json.dumps(one, sort_keys=True)
        return [f"{where}: {error}" for version in (OLDEST, NEWEST) for error in _kubernetes(text, version)]
    if one["kind"] not in _schema(file)["properties"]:
        return [f"{where}: no schema for it"]
    errors = _validator(file, one["kind"]).iter_errors(one)
    return [f"{where}: {'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


@cache  # overlays share most of their objects
def _kubernetes(text: str, version: str) -> tuple[str, ...]:
    try:
        kubernetes_validate.validate(json.loads(text), version, strict=True)
    except (
        kubernetes_validate.ValidationError,
        kubernetes_validate.SchemaNotFoundError,
        kubernetes_validate.InvalidSchemaError,
    ) as error:
        return (f"Kubernetes {version}: {str(getattr(error, 'message', error))[:200]}",)
    return ()


def cel_rules() -> set[str]:
    """Return the texts of the validation rules in CEL that KubeRay's CRDs hold; JSON Schema does not evaluate them."""
    found: set[str] = set()

    def walk(node: Any) -> None:
        for name, child in (
            node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        ):
            if name == "x-kubernetes-validations":
                found.update(item["rule"] for item in child)
            else:
                walk(child)

    walk(_schema("kuberay.json"))
    return found
