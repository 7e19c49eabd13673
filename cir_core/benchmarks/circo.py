"""CIRCO (Baldrati et al., ICCV 2023): open-domain queries with several ground truths each.

    <base>/annotations/<split>.json                                                  queries
    <base>/COCO2017_unlabeled/annotations/image_info_unlabeled2017.json              gallery: 123,403 images
    <base>/COCO2017_unlabeled/unlabeled2017/*.jpg                                    pictures

<base> is the root itself or CIRCO, circo below it (SEARLE's layout). Image ids are COCO's, as decimal digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cir_core import files
from cir_core.benchmarks.annotations import Row, choose, explicit_gallery, find_file, read_rows
from cir_core.benchmarks.base import RECALL_RULES, Benchmark
from cir_core.benchmarks.images import ImageFiles
from cir_core.schema import CirError, Query

SPLITS = ("val", "test")
SOURCE = "https://github.com/miccunifi/CIRCO"
COCO_SOURCE = "http://images.cocodataset.org/annotations/image_info_unlabeled2017.zip, or pass gallery_ids"
COCO_IMAGES = 123_403
DEPTHS = (5, 10, 25, 50)
HEADLINE = "map@5"
METRICS = (*(f"map@{k}" for k in DEPTHS), *(f"recall@{k}" for k in DEPTHS), "pessimistic_recall@10")
ASPECTS = (
    "cardinality",
    "addition",
    "negation",
    "direct_addressing",
    "compare_change",
    "comparative_statement",
    "statement_with_conjunction",
    "spatial_relations_background",
    "viewpoint",
)
_BASES = ("", "CIRCO", "circo")
_LISTING = "image_info_unlabeled2017.json"
_COCO = ("COCO2017_unlabeled/", "")


def load_circo(
    root: str,
    split: str = "val",
    gallery_ids: Sequence[str] | None = None,
    *,
    reference: Literal["kept", "removed"] = "kept",
    shared_concept: Literal["off", "on"] | bool = "off",
) -> Benchmark:
    """Load the val or test split. test's answers are the test server's: it has no targets.

    reference: "kept" leaves a query's reference in its ranking, as most published code does; "removed" takes
        it out of that ranking alone (it may be a right answer of another query).
    shared_concept: "on" (or True) makes the text "<shared_concept>, but <relative_caption>"; "off" (or False)
        leaves it out.

    map@K divides by min(number of ground truths, K); recall@K counts `target_img_id` alone. With gallery_ids
    the list of COCO's images is not needed.
    """
    choose("circo", "split", split, SPLITS)
    choose("circo", "reference", reference, ("kept", "removed"))
    concept = ("on" if shared_concept else "off") if isinstance(shared_concept, bool) else shared_concept
    choose("circo", "shared_concept", concept, ("off", "on"))
    places = [f"{base}:annotations/{split}.json" for base in _BASES]
    base, uri = find_file(f"circo {split}", root, places, source=SOURCE)
    rows = read_rows(uri)
    if gallery_ids is None:
        gallery, named = _read_gallery(root)
    else:
        gallery, named = explicit_gallery("circo", gallery_ids), "explicit"
    text = "{shared_concept}, but {relative_caption}" if concept == "on" else "{relative_caption}"
    return Benchmark(
        name="circo",
        split=split,
        queries=tuple(_query(row, has_targets=split == "val", with_concept=concept == "on") for row in rows),
        gallery_ids=gallery,
        protocol={
            "gallery": named,
            "gallery_size": len(gallery),
            "reference": reference,
            "shared_concept": concept,
            "text": text,
            "recall_counts": RECALL_RULES["first"],
            "average_precision": "divided by min(number of ground truths, K)",
        },
        metrics=METRICS,
        headline=HEADLINE,
        has_targets=split == "val",
        recall="first",
        outside_references=gallery_ids is not None,
        aspects=_aspects(rows) if split == "val" else {},
        aspect_metric="map@10" if split == "val" else "",
        images=ImageFiles(
            folders=tuple(files.join(folder, f"{inner}unlabeled2017") for folder in (base, root) for inner in _COCO),
            source="http://images.cocodataset.org/zips/unlabeled2017.zip",
            stems={name: name.zfill(12) for name in (*gallery, *(row.name("reference_img_id") for row in rows))},
        ),
    )


def _read_gallery(root: str) -> tuple[tuple[str, ...], str]:
    """Return COCO's image ids in file order, and what the protocol calls that list."""
    places = [f"{base}:{inner}annotations/{_LISTING}" for base in _BASES for inner in _COCO]
    _, uri = find_file("circo gallery", root, places, source=COCO_SOURCE)
    listing = files.read_json(uri)
    name = files.redact(uri)
    if not isinstance(listing, dict) or not isinstance(listing.get("images"), list) or not listing["images"]:
        raise CirError(f"{name}: expected a JSON object with a list under 'images', found {listing!r:.80}")
    ids = []
    for place, image in enumerate(listing["images"]):
        if not isinstance(image, dict):
            raise CirError(f"{name}, image {place}: expected a JSON object, found {image!r:.80}")
        ids.append(Row(f"{name}, image {place}", image).name("id"))
    partial = "" if len(ids) == COCO_IMAGES else f", {len(ids)} of its {COCO_IMAGES} images: scores do not compare"
    return tuple(ids), f"COCO 2017 unlabeled{partial}"


def _query(row: Row, *, has_targets: bool, with_concept: bool) -> Query:
    targets = row.names("gt_img_ids") if has_targets else ()
    if has_targets and (not targets or targets[0] != row.name("target_img_id")):
        raise row.fault("gt_img_ids", f"ground truths that start with the target {row.values.get('target_img_id')!r}")
    caption = row.text("relative_caption", may_be_empty=True)
    return Query(
        query_id=row.name("id"),
        reference_id=row.name("reference_img_id"),
        relative_caption=f"{row.text('shared_concept')}, but {caption}" if with_concept else caption,
        target_ids=targets,
    )


def _aspects(rows: Sequence[Row]) -> dict[str, frozenset[str]]:
    """The nine aspects in the paper's order, each with its queries; an aspect without queries stays, empty."""
    found: dict[str, set[str]] = {name: set() for name in ASPECTS}
    for row in rows:
        for name in row.texts("semantic_aspects"):
            choose(row.where, "semantic_aspects", name, ASPECTS)
            found[name].add(row.name("id"))
    return {name: frozenset(ids) for name, ids in found.items()}
