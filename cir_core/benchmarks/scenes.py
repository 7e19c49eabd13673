"""The scenes benchmark: generated pictures of coloured shapes with composed queries. A smoke signal, not a
result.

    <root>/<split>/gallery/NNNNN.tar    image-text shards, key = gallery id
    <root>/<split>/queries.jsonl        query_id, reference, relative_caption, target_ids, kind
    <root>/<split>/benchmark.json       name, version, seed, num_gallery, num_queries, gallery_ids
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cir_core import files
from cir_core.benchmarks.annotations import explicit_gallery
from cir_core.benchmarks.base import Benchmark
from cir_core.benchmarks.query_files import read_queries
from cir_core.schema import CirError

VERSIONS = (1,)
METRICS = ("recall@1", "recall@5", "recall@10", "recall@50", "map@10", "pessimistic_recall@10")
_FIELDS = {
    "name": str,
    "version": int,
    "seed": int,
    "num_gallery": int,
    "num_queries": int,
    "gallery_ids": list,
}


def load_scenes(
    root: str, split: str = "val", gallery_ids: Sequence[str] | None = None, *, reference: str = "removed"
) -> Benchmark:
    """Load `<root>/<split>`. reference: "removed" takes a query's reference out of its own ranking, "kept"
    does not. gallery_ids: search these instead of the whole gallery.

    Raises CirError for a folder without benchmark.json (it is unfinished), another version, counts that do
    not fit the files, and every fault that `Benchmark` and `read_queries` find.
    """
    if reference not in ("removed", "kept"):
        raise CirError(f"scenes: reference must be 'removed' or 'kept', not {reference!r}")
    folder = files.join(root, split)
    summary = _read_summary(folder)
    queries, kinds = read_queries(files.join(folder, "queries.jsonl"))
    for name, found in (("num_gallery", len(summary["gallery_ids"])), ("num_queries", len(queries))):
        if summary[name] != found:
            raise CirError(
                f"{files.redact(folder)}: benchmark.json says {name} = {summary[name]}, found {found}; "
                "write the benchmark again"
            )
    own = tuple(summary["gallery_ids"])
    gallery = own if gallery_ids is None else explicit_gallery("scenes", gallery_ids)
    return Benchmark(
        name="scenes",
        split=split,
        queries=queries,
        gallery_ids=gallery,
        protocol={
            "data": "generated pictures",
            "version": summary["version"],
            "seed": summary["seed"],
            **({} if gallery_ids is None else {"gallery": "explicit"}),
            "gallery_size": len(gallery),
            "reference": reference,
        },
        metrics=METRICS,
        headline="recall@10",
        image_shards=files.join(folder, "gallery"),
        query_kinds=kinds,
        outside_references=gallery_ids is not None,
    )


def _read_summary(folder: str) -> dict[str, Any]:
    uri = files.join(folder, "benchmark.json")
    if not files.exists(uri):
        raise CirError(f"{files.redact(uri)}: missing, so this is no finished scenes benchmark; write it again")
    summary = files.read_json(uri)
    for name, kind in _FIELDS.items():
        value = summary.get(name) if isinstance(summary, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CirError(f"{files.redact(uri)}: {name} must be of type {kind.__name__}, found {value!r:.80}")
    if summary["name"] != "scenes" or summary["version"] not in VERSIONS:
        raise CirError(
            f"{files.redact(uri)}: is {summary['name']!r} version {summary['version']}, expected 'scenes' "
            f"version {' or '.join(map(str, VERSIONS))}"
        )
    if not all(isinstance(name, str) for name in summary["gallery_ids"]):
        raise CirError(f"{files.redact(uri)}: gallery_ids must be strings")
    return dict(summary)
