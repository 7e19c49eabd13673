"""People's own queries against any gallery: a queries file with or without targets, searched in an embedding store.

    <file>.jsonl | <file>.parquet, or <root>/<split>.jsonl | .parquet, or <root>/queries.jsonl | .parquet, or <root>/*

How a saved ranking of them is scored again, on any machine:

    benchmark = load_benchmark("custom", "queries.jsonl", gallery="s3://bucket/store")
    evaluate(load_ranking("part-00000.parquet")[0.8], benchmark)  # with all queries answered in one part
"""

from __future__ import annotations

from collections.abc import Sequence

from cir_core import files
from cir_core.benchmarks.annotations import explicit_gallery
from cir_core.benchmarks.base import Benchmark
from cir_core.benchmarks.query_files import SUFFIXES, QueryCounts, list_query_files, read_queries
from cir_core.embedding_store import EmbeddingStore
from cir_core.schema import CirError, Query

METRICS = ("recall@1", "recall@5", "recall@10", "recall@50", "map@10", "pessimistic_recall@10")
HEADLINE = "recall@10"


def load_custom(
    root: str,
    split: str = "val",
    gallery_ids: Sequence[str] | None = None,
    *,
    reference: str = "removed",
    gallery: str = "",
) -> Benchmark:
    """Load queries and the ids they are searched in.

    root: a queries file, or several: a glob, or a folder. Of a folder with <split>.jsonl, <split>.parquet, queries.jsonl or
        queries.parquet that one alone is read, else every queries file in it.
    gallery: URI of the embedding store that is searched; or gallery_ids, in the order that breaks ties.
    reference: "removed" takes a query's reference out of its own ranking, "kept" does not; a reference may be the
        URI of a picture outside the gallery.
    Where every query has subset_ids, each ranks only its own. Raises CirError for no gallery or two, targets or subsets
    that only some queries have, naming the first without, and every fault of the file and of `Benchmark`.
    """
    if reference not in ("removed", "kept"):
        raise CirError(f"custom: reference must be 'removed' or 'kept', not {reference!r}")
    read = {files.redact(uri): read_queries(uri) for uri in _queries_files(root, split)}
    queries = tuple(query for found, _ in read.values() for query in found)
    kinds = {name: kind for _, found in read.values() for name, kind in found.items()}
    if not queries:
        raise CirError(f"{', '.join(read)}: holds no queries")
    counts = QueryCounts.total(QueryCounts.of(found, name) for name, (found, _) in read.items())
    ids, searched = _gallery(gallery_ids, gallery)
    return Benchmark(
        name="custom",
        split=split,
        queries=queries,
        gallery_ids=ids,
        protocol={"queries": " ".join(read), **searched, "gallery_size": len(ids), "reference": reference},
        metrics=METRICS,
        headline=HEADLINE,
        query_kinds=kinds,
        has_targets=counts.have_targets,
        own_galleries=counts.have_subsets,
        outside_references=True,
    )


def metrics_up_to(k: int) -> tuple[str, ...]:
    """Return the metrics that a list of k results can tell, the headline, or what comes closest to it, first.

    >>> metrics_up_to(5)
    ('recall@5', 'recall@1')
    """
    told = [name for name in METRICS if int(name.rpartition("@")[2]) <= k]
    first = HEADLINE if HEADLINE in told else max(told, key=lambda name: int(name.rpartition("@")[2]))
    return (first, *(name for name in told if name != first))


def is_picture(reference: str) -> bool:
    """Whether a reference that the gallery does not hold names a picture: a URI or an absolute path.

    >>> is_picture("https://shop/1.jpg"), is_picture("/pictures/1.jpg"), is_picture("pictures/1.jpg")
    (True, True, False)
    """
    return "://" in reference or reference.startswith("/")


def check_answerable(query: Query, *, reference_removed: bool) -> None:
    """Raise CirError, naming the query, for one that no gallery can answer, or whose targets none can hold."""
    where = f"query {query.query_id!r}"
    if reference_removed and query.reference_id in query.target_ids:
        raise CirError(f"{where}: its reference {query.reference_id!r} is a target, yet removed by the protocol")
    if reference_removed and query.subset_ids == (query.reference_id,):
        raise CirError(f"{where}: its own gallery (subset_ids) holds only its reference, which the protocol removes")
    if query.subset_ids and not set(query.target_ids) <= set(query.subset_ids):
        raise CirError(f"{where}: a target is not in the query's own gallery (subset_ids)")


def _queries_files(root: str, split: str) -> list[str]:
    for stem in (split, "queries") if files.is_folder(root) else ():
        found = [uri for suffix in SUFFIXES if files.exists(uri := files.join(root, stem + suffix))]
        if len(found) > 1:
            raise CirError(f"{files.redact(root)}: holds {stem}.jsonl and {stem}.parquet; name the one that is meant")
        if found:
            return found
    return list_query_files(root)


def _gallery(gallery_ids: Sequence[str] | None, gallery: str) -> tuple[tuple[str, ...], dict[str, object]]:
    """Return the ids to search and what the protocol says of them."""
    if (gallery_ids is None) == (not gallery):
        raise CirError("custom: needs one gallery: gallery= the URI of an embedding store, or gallery_ids=")
    if gallery_ids is not None:
        return explicit_gallery("custom", gallery_ids), {"gallery": "explicit"}
    store = EmbeddingStore.open(gallery)
    return tuple(store.read_ids()), {"gallery": files.redact(gallery), "store": store.identity}
