"""A benchmark: its queries with their right answers, its gallery and its protocol. Checked once, here, for
all loaders.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from cir_core.benchmarks.images import Crop, ImageFiles
from cir_core.files import StoredFile
from cir_core.schema import CirError, Query

METRIC_NAMES = ("recall", "recall_subset", "map", "pessimistic_recall")
RecallRule = Literal["any", "first", "soft", "fraction"]
RECALL_RULES: dict[str, str] = {
    "any": "1 where any target is among the first K",
    "first": "1 where the annotated target is among the first K",
    "soft": "the best value of target_soft among the first K, at least 0",
    "fraction": "the share of the targets that are among the first K",
}
TieRule = Literal["listed", "against_target"]
_ONE = rf"(?:{'|'.join(METRIC_NAMES)})@[1-9]\d*"
_METRIC = re.compile(rf"({'|'.join(METRIC_NAMES)})@([1-9]\d*)")
_MEAN = re.compile(rf"mean((?:_{_ONE}){{2,}})")


@dataclass(frozen=True)
class Benchmark:
    """Queries, gallery and protocol of one split. Building one checks it; a fault is a CirError naming the
    query.

    name, split: as asked for at `load_benchmark`.
    queries: in file order. gallery_ids: in gallery order, which is the order that breaks ties.
    protocol: every choice that changes a score, printed with it. `reference` is "removed" (a query's
        reference is taken out of its own ranking) or "kept".
    metrics: what `evaluate` computes, such as "recall@10"; their names are METRIC_NAMES, and
        "mean_recall@5_recall_subset@1" is the mean of the two. headline: the one to quote.
    image_shards: URI of the folder of image-text shards whose keys are the gallery ids; "" when there is
        none. images: where the pictures lie as single files, None when they are in shards.
    crops: image id -> the box of its picture that is embedded; an id that is absent is a whole picture.
    query_kinds: query id -> kind, for metrics by kind; empty when the benchmark has no kinds.
    aspects: aspect -> ids of its queries, for `aspect_metric` by aspect; one may be empty ("n/a").
    has_targets: False for a split whose answers only a test server knows.
    recall: what recall@K and recall_subset@K count, a key of RECALL_RULES. soft_targets: query id -> image id
        -> value, for "soft".
    ties: "listed" takes the ranking's order, "against_target" counts a recall@K only if every tie is lost.
    own_galleries: whether each query ranks only its own subset_ids (GeneCIS), not the gallery.
    outside_references: whether references may lie outside the gallery.
    empty_targets: whether a query may lack targets; it then counts as 0, as in Pic2Word's domain conversion.
    """

    name: str
    split: str
    queries: tuple[Query, ...]
    gallery_ids: tuple[str, ...]
    protocol: Mapping[str, object]
    metrics: tuple[str, ...]
    headline: str
    image_shards: str = ""
    query_kinds: Mapping[str, str] = field(default_factory=dict)
    has_targets: bool = True
    recall: RecallRule = "any"
    soft_targets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ties: TieRule = "listed"
    own_galleries: bool = False
    outside_references: bool = False
    empty_targets: bool = False
    aspects: Mapping[str, frozenset[str]] = field(default_factory=dict)
    aspect_metric: str = ""
    images: ImageFiles | None = None
    crops: Mapping[str, Crop] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every name resolves and that every query can be scored."""
        if not self.queries or not self.gallery_ids:
            raise CirError(f"{self}: {len(self.queries)} queries, {len(self.gallery_ids)} gallery images; need both")
        _refuse_duplicates(f"{self}: gallery id", self.gallery_ids)
        _refuse_duplicates(f"{self}: query id", (query.query_id for query in self.queries))
        gallery = frozenset(self.gallery_ids)
        if "" in gallery:
            raise CirError(f"{self}: an empty gallery id; the empty string marks an empty place of a ranking")
        for query in self.queries:
            self._check_query(query, gallery)
        self._check_protocol(gallery)

    def __str__(self) -> str:
        return f"benchmark {self.name!r} split {self.split!r}"

    @property
    def reference_removed(self) -> bool:
        """Whether a query's reference is taken out of its own ranking before it is scored."""
        return self.protocol["reference"] == "removed"

    @property
    def max_k(self) -> int:
        """The deepest k of the metrics that read the ranking from its top."""
        return max(k for name, k in self._parts() if name != "recall_subset")

    @property
    def max_subset_k(self) -> int:
        """The deepest k of the metrics that rank the query's subset alone; 0 without such a metric."""
        return max((k for name, k in self._parts() if name == "recall_subset"), default=0)

    @property
    def image_ids(self) -> tuple[str, ...]:
        """Every image to embed: the gallery, then the references that lie outside it, in query order."""
        gallery = frozenset(self.gallery_ids)
        outside = dict.fromkeys(query.reference_id for query in self.queries if query.reference_id not in gallery)
        return (*self.gallery_ids, *outside)

    def image_files(
        self, image_ids: Iterable[str] | None = None, *, missing: Literal["error", "skip"] = "error"
    ) -> dict[str, StoredFile]:
        """Return {image id: its picture file}, by default for all of `image_ids`.

        Ids that `crops` names share a picture with others. Raises CirError counting and naming the missing
        pictures (with "skip" only if all are), and for a benchmark whose pictures are in shards.
        """
        if self.images is None:
            raise CirError(f"{self}: its pictures are no single files; read its shards: {self.image_shards!r}")
        try:
            return self.images.locate(self.image_ids if image_ids is None else image_ids, missing=missing)
        except CirError as error:
            raise CirError(f"{self}: {error}") from None

    def without_images(self, image_ids: Iterable[str]) -> Benchmark:
        """Return this benchmark without some images, as a person asked for who lacks their pictures.

        They leave the gallery, the targets and the soft targets; a query goes with them if its reference, a member
        of its subset, its annotated target (where recall counts only that) or every target was among them. The
        protocol says how many images and queries were left out: such a score compares with no other.
        Raises CirError if nothing is left.
        """
        gone = frozenset(image_ids)
        lost = gone & frozenset(self.image_ids)
        kept = []
        for query in self.queries:
            targets = tuple(name for name in query.target_ids if name not in gone)
            answered = bool(targets) or not query.target_ids
            if self.recall == "first" and targets[:1] != query.target_ids[:1]:
                answered = False
            if answered and not gone & {query.reference_id, *query.subset_ids}:
                kept.append(replace(query, target_ids=targets))
        names = frozenset(query.query_id for query in kept)
        images = (frozenset(self.gallery_ids) | {query.reference_id for query in kept}) - gone
        return replace(
            self,
            queries=tuple(kept),
            gallery_ids=tuple(name for name in self.gallery_ids if name not in gone),
            protocol={
                **self.protocol,
                "gallery_size": len(self.gallery_ids) - len(gone & frozenset(self.gallery_ids)),
                "images_left_out": len(lost),
                "queries_left_out": len(self.queries) - len(kept),
            },
            query_kinds={name: kind for name, kind in self.query_kinds.items() if name in names},
            soft_targets={
                name: {image: value for image, value in values.items() if image not in gone}
                for name, values in self.soft_targets.items()
                if name in names
            },
            aspects={aspect: ids & names for aspect, ids in self.aspects.items()},
            crops={name: crop for name, crop in self.crops.items() if name in images},
        )

    def ranked_sizes(self) -> tuple[int, ...]:
        """Return how many images each query ranks: its gallery, less a reference that the protocol removes."""
        gallery = frozenset(self.gallery_ids)
        sizes = []
        for query in self.queries:
            own = query.subset_ids if self.own_galleries else gallery
            sizes.append(len(own) - int(self.reference_removed and query.reference_id in own))
        return tuple(sizes)

    def _parts(self) -> list[tuple[str, int]]:
        return [metric_parts(member) for metric in self.metrics for member in metric_members(metric)]

    def _check_query(self, query: Query, gallery: frozenset[str]) -> None:
        where = f"{self}: query {query.query_id!r}"
        if query.reference_id not in gallery and not self.outside_references:
            raise CirError(f"{where}: its reference {query.reference_id!r} is not in the gallery")
        if self.has_targets and not query.target_ids and not self.empty_targets:
            raise CirError(f"{where}: has no ground truth (target_ids is empty)")
        if self.own_galleries and not query.subset_ids:
            raise CirError(f"{where}: has no gallery of its own (subset_ids is empty)")
        _refuse_duplicates(f"{where}: target", query.target_ids)
        _refuse_duplicates(f"{where}: subset member", query.subset_ids)
        soft = tuple(self.soft_targets.get(query.query_id, ()))
        for noun, ids in (("target", query.target_ids), ("subset member", query.subset_ids), ("soft target", soft)):
            for missing in (name for name in ids if name not in gallery):
                raise CirError(f"{where}: its {noun} {missing!r} is not in the gallery")
        if self.own_galleries and not set(query.target_ids) <= set(query.subset_ids):
            raise CirError(f"{where}: a target is not in the query's own gallery")
        if self.reference_removed and query.reference_id in query.target_ids:
            raise CirError(f"{where}: its reference {query.reference_id!r} is a target, yet removed by the protocol")

    def _check_protocol(self, gallery: frozenset[str]) -> None:
        if self.protocol.get("reference") not in ("removed", "kept"):
            raise CirError(f"{self}: protocol['reference'] must be 'removed' or 'kept', not {self.protocol!r}")
        if self.headline not in self.metrics:
            raise CirError(f"{self}: the headline {self.headline!r} is not among its metrics {self.metrics}")
        self._parts()  # names every unknown metric
        if self.aspects and self.aspect_metric not in self.metrics:
            raise CirError(f"{self}: the aspects' metric {self.aspect_metric!r} is not among {self.metrics}")
        if self.recall not in RECALL_RULES:
            raise CirError(f"{self}: recall must not be {self.recall!r}; {near_matches(self.recall, RECALL_RULES)}")
        if self.ties == "against_target" and self.recall not in ("any", "first"):
            raise CirError(f"{self}: recall {self.recall!r} cannot count ties against the target")
        if stray := self.crops.keys() - gallery - {query.reference_id for query in self.queries}:
            raise CirError(f"{self}: a crop for {min(stray)!r}, which is neither in the gallery nor a reference")


def metric_parts(metric: str) -> tuple[str, int]:
    """Split a metric's name into its kind and its k; CirError for an unknown one.

    >>> metric_parts("recall@10")
    ('recall', 10)
    """
    match = _METRIC.fullmatch(metric)
    if match is None:
        known = ", ".join(f"{name}@K" for name in METRIC_NAMES)
        raise CirError(f"unknown metric {metric!r}; known: {known} with K at least 1, and mean_..._... of several")
    return match[1], int(match[2])


def metric_members(metric: str) -> tuple[str, ...]:
    """Return the metrics that a named mean averages, or the metric itself where it is no mean.

    >>> metric_members("mean_recall@5_recall_subset@1"), metric_members("map@5")
    (('recall@5', 'recall_subset@1'), ('map@5',))
    """
    match = _MEAN.fullmatch(metric)
    return tuple(re.findall(_ONE, match[1])) if match else (metric,)


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return the tail of an error message: the closest known names first, then all of them.

    >>> near_matches("scene", ["scenes", "cirr"])
    "did you mean 'scenes'? known: cirr, scenes"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


def _refuse_duplicates(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CirError(f"{what} {name!r} is listed twice")
        seen.add(name)


Loader = Callable[..., Benchmark]
