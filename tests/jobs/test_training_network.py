"""The interface that training workers use is that of the node's address, unless the user chose one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jobs import training_network
from jobs.training_network import NodesTorchConfig, use_the_nodes_interface


@pytest.mark.parametrize(
    ("address", "chosen", "expected"),
    [("10.1.2.3", None, "eth1"), ("127.0.0.1", None, "lo"), ("10.1.2.3", "ib0", "ib0"), ("10.9.9.9", None, None)],
)
def test_the_interface_with_the_nodes_address_is_taken(address, chosen, expected, monkeypatch):
    interfaces = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.1.2.30"], "eth1": ["aa:bb:cc", "10.1.2.3"]}
    found = {name: [SimpleNamespace(address=one) for one in all_of_it] for name, all_of_it in interfaces.items()}
    monkeypatch.setattr(training_network.psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(training_network.ray.util, "get_node_ip_address", lambda: address)
    environment = {} if chosen is None else {"GLOO_SOCKET_IFNAME": chosen}
    monkeypatch.setattr(training_network.os, "environ", environment)
    use_the_nodes_interface()
    assert environment.get("GLOO_SOCKET_IFNAME") == expected


def test_every_worker_chooses_before_the_process_group_is_formed(monkeypatch):
    calls = []
    backend = NodesTorchConfig().backend_cls
    monkeypatch.setattr(backend.__mro__[1], "on_start", lambda *_: calls.append("process group"))
    group = SimpleNamespace(execute=lambda function: calls.append(function))
    backend().on_start(group, NodesTorchConfig())
    assert calls == [use_the_nodes_interface, "process group"]
