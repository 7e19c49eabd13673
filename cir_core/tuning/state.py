"""A tuner's state as one safetensors file: adapter, optimiser moments and metadata; nothing in it can run code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cir_core.schema import CirError


def state_bytes(
    trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, metadata: dict[str, Any]
) -> bytes:
    """Return the file's content."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    data: bytes = save(tensors, {"tuning": json.dumps(metadata)})
    return data


def load_state(path: str, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what `state_bytes` wrote, from a local file, and return its metadata.

    Raises:
        CirError: the file belongs to another adapter (names differ).
    """
    with safe_open(path, framework="pt") as handle:
        names = set(handle.keys())
        wanted = {f"parameter/{name}" for name in trainable}
        if wanted != {name for name in names if name.startswith("parameter/")}:
            raise CirError(f"{path} is the state of another adapter: its parameters differ from this model's")
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(handle.get_tensor(f"parameter/{name}"))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in names]
                if keys:
                    optimizer.state[parameter] = {
                        key: handle.get_tensor(f"{key}/{name}").to("cpu" if key == "step" else parameter.device)
                        for key in keys
                    }
        metadata: dict[str, Any] = json.loads((handle.metadata() or {}).get("tuning", "{}"))
        return metadata
