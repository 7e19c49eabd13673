"""By which interface training workers on several machines reach one another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig


def use_the_nodes_interface() -> None:
    """Have gloo use the interface that has the address by which Ray knows this node, unless the user named another.

    Gloo takes what the host's name resolves to, which on Debian is 127.0.1.1: workers elsewhere cannot reach that.
    """
    address = ray.util.get_node_ip_address()
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


_TorchBackend: Any = TorchConfig().backend_cls


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Choose each worker's interface, then form the process group."""
        worker_group.execute(use_the_nodes_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class NodesTorchConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's settings of the process group, with `use_the_nodes_interface` on every worker before."""

    @property
    def backend_cls(self) -> type:
        """What sets the process group up."""
        return _Backend
