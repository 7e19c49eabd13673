"""Benchmarks of composed image retrieval. `LOADERS` is a plain dict: a name, and the function that reads its
folder.

A loader takes (root, split, gallery_ids) and its protocol options as keyword-only arguments with defaults: its
signature is the list of valid options.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from cir_core.benchmarks.base import (
    Benchmark,
    Loader,
    metric_members,
    metric_parts,
    near_matches,
)
from cir_core.benchmarks.captions import read_captions
from cir_core.benchmarks.circo import load_circo
from cir_core.benchmarks.cirr import load_cirr
from cir_core.benchmarks.custom import load_custom
from cir_core.benchmarks.domain_conversion import load_domain_conversion
from cir_core.benchmarks.fashioniq import load_fashioniq
from cir_core.benchmarks.genecis import load_genecis
from cir_core.benchmarks.images import Crop, ImageFiles
from cir_core.benchmarks.query_files import (
    QueryCounts,
    QueryFilePlan,
    QuerySlice,
    list_query_files,
    plan_query_file,
    read_queries,
    read_query_slice,
)
from cir_core.benchmarks.scenes import load_scenes
from cir_core.schema import CirError

LOADERS: dict[str, Loader] = {
    "circo": load_circo,
    "cirr": load_cirr,
    "custom": load_custom,
    "domain_conversion": load_domain_conversion,
    "fashioniq": load_fashioniq,
    "genecis": load_genecis,
    "scenes": load_scenes,
}

__all__ = [
    "LOADERS",
    "Benchmark",
    "Crop",
    "ImageFiles",
    "QueryCounts",
    "QueryFilePlan",
    "QuerySlice",
    "list_query_files",
    "load_benchmark",
    "metric_members",
    "metric_parts",
    "near_matches",
    "plan_query_file",
    "protocol_options",
    "read_captions",
    "read_queries",
    "read_query_slice",
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


def load_benchmark(
    name: str, root: str, split: str = "val", *, gallery_ids: Sequence[str] | None = None, **protocol: object
) -> Benchmark:
    """Load a benchmark from its folder `root` (a path or any URI), checked.

    gallery_ids: image ids to search instead of the benchmark's own gallery, in the order that breaks ties.
    References may then lie outside; targets and subset members may not.
    protocol: options of that benchmark (see `protocol_options`); each is printed with every score.
    Raises CirError for an unknown name or option, listing the valid ones, and for faulty files.
    """
    options = protocol_options(name)
    for option in protocol:
        if option not in options:
            known = {*options, "gallery_ids"}
            raise CirError(f"{name}: unknown protocol option {option!r}; {near_matches(option, known)}")
    return LOADERS[name](str(root), split, gallery_ids, **protocol)
