"""Benchmarks of composed image retrieval. `LOADERS` is a plain dict: a name, and the function that reads its
folder.

A loader takes (root, split) and its protocol options as keyword-only arguments with defaults: its signature
is the list of valid options.
"""

from __future__ import annotations

import inspect

from cir_core.benchmarks.base import Benchmark, Loader, metric_parts, near_matches, read_queries
from cir_core.benchmarks.scenes import load_scenes
from cir_core.schema import CirError

LOADERS: dict[str, Loader] = {"scenes": load_scenes}

__all__ = [
    "LOADERS",
    "Benchmark",
    "load_benchmark",
    "metric_parts",
    "near_matches",
    "protocol_options",
    "read_queries",
]


def protocol_options(name: str) -> dict[str, object]:
    """Return the protocol options of a benchmark with their defaults.

    >>> protocol_options("scenes")
    {'reference': 'removed'}
    """
    if name not in LOADERS:
        raise CirError(f"unknown benchmark {name!r}; {near_matches(name, LOADERS)}")
    parameters = inspect.signature(LOADERS[name]).parameters.values()
    return {item.name: item.default for item in parameters if item.kind is item.KEYWORD_ONLY}


def load_benchmark(name: str, root: str, split: str = "val", **protocol: object) -> Benchmark:
    """Load a benchmark from its folder `root` (a path or any URI), checked.

    protocol: options of that benchmark (see `protocol_options`); each is printed with every score.
    Raises CirError for an unknown name or option, listing the valid ones, and for faulty files.
    """
    options = protocol_options(name)
    for option in protocol:
        if option not in options:
            raise CirError(f"{name}: unknown protocol option {option!r}; {near_matches(option, options)}")
    return LOADERS[name](str(root), split, **protocol)
