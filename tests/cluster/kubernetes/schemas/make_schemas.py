"""Make the strict schemas beside this file from the OpenAPI schemas of KubeRay's CRDs; needed when KubeRay's version changes.

    python make_schemas.py rayjob.openapi.json raycluster.openapi.json

Each argument is `spec.versions[name=v1].schema.openAPIV3Schema` of a CRD as JSON. Strict: an object whose fields are named
takes no others. What repeats (pod templates, mostly) is written once, under $defs. Descriptions are left out.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_LARGE = 400  # characters of a subtree that is worth a name
_DROPPED = ("description", "default")
_QUANTITY = {"type": ["integer", "string"]}


def strict(schema: Any, *, field_names: bool = False) -> Any:
    """Return the schema with unknown fields refused. field_names: the keys are names of fields, not of the schema language."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if field_names:
        return {key: strict(value) for key, value in schema.items()}
    found = {
        key: strict(value, field_names=key == "properties") for key, value in schema.items() if key not in _DROPPED
    }
    with_default = {key for key, value in schema.get("properties", {}).items() if "default" in value}
    if "required" in found:  # the API server fills defaults in before it looks
        found["required"] = [key for key in found["required"] if key not in with_default]
    if found.pop("x-kubernetes-int-or-string", False):
        found.pop("anyOf", None)
        found |= _QUANTITY
    closed = "properties" in found and not found.pop("x-kubernetes-preserve-unknown-fields", False)
    if closed:
        found.setdefault("additionalProperties", False)
    return {
        key: value for key, value in found.items() if not key.startswith("x-kubernetes-") or key.endswith("validations")
    }


def shared(schema: Any) -> dict[str, Any]:
    """Return the schema with every large subtree that repeats under $defs."""
    counts: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, dict):
            text = json.dumps(node, sort_keys=True)
            counts[text] += len(text) >= _LARGE and "type" in node
            if counts[text] > 1:
                return  # its parts repeat with it
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            count(child)

    count(schema)
    names = {text: f"d{number}" for number, text in enumerate(text for text, seen in counts.items() if seen > 1)}

    def name(node: Any, *, own: bool = False) -> Any:
        if isinstance(node, dict):
            text = json.dumps(node, sort_keys=True)
            if text in names and not own:
                return {"$ref": f"#/$defs/{names[text]}"}
            return {key: name(value) for key, value in node.items()}
        return [name(item) for item in node] if isinstance(node, list) else node

    return {**name(schema), "$defs": {key: name(json.loads(text), own=True) for text, key in names.items()}}


def main() -> None:
    """Write kuberay.json: {"RayJob": schema, "RayCluster": schema}, sharing what is equal."""
    kinds = [strict(json.loads(Path(argument).read_text())) for argument in sys.argv[1:3]]
    for kind in kinds:
        kind["properties"].pop("status", None)
        kind["additionalProperties"] = False
    together = shared({"properties": dict(zip(("RayJob", "RayCluster"), kinds, strict=True))})
    (HERE / "kuberay.json").write_text(json.dumps(together, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
