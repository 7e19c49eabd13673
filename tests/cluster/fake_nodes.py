"""Ray's fake machines, which know no memory to give out, with it. Imported by the autoscaler on the head."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import ray._private.parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class NodesWithMemory(FakeMultiNodeProvider):
    """A machine type's resource "memory" becomes that of `ray start`."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        rest = dict(resources)
        parameters = functools.partial(ray._private.parameter.RayParams, memory=rest.pop("memory"))
        with mock.patch.object(ray._private.parameter, "RayParams", parameters):
            super()._create_node_with_resources_and_labels(node_config, tags, count, rest, labels)
