"""CIRR (Liu et al., ICCV 2021), annotations rc2: real-life images in groups of six.

    <base>/cirr/captions/cap.rc2.<split>.json          queries; or <base>/captions/...
    <base>/cirr/image_splits/split.rc2.<split>.json    gallery: image name -> path of its picture
    <base>/dev/*.png, <base>/test1/*.png               pictures, looked for only when they are embedded

<base> is the root itself or CIRR, cirr_dataset, cirr below it (SEARLE's and CLIP4Cir's layouts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from cir_core import files
from cir_core.benchmarks.annotations import Row, choose, explicit_gallery, find_file, read_rows
from cir_core.benchmarks.base import RECALL_RULES, Benchmark
from cir_core.benchmarks.images import ImageFiles
from cir_core.schema import CirError, Query

SPLITS = ("val", "test1")
SOURCE = "https://github.com/Cuberick-Orion/CIRR (annotations: branch cirr_dataset)"
HEADLINE = "mean_recall@5_recall_subset@1"
METRICS = (
    *(f"recall@{k}" for k in (1, 5, 10, 50)),
    *(f"recall_subset@{k}" for k in (1, 2, 3)),
    HEADLINE,
    "pessimistic_recall@5",
)
_BASES = ("", "CIRR", "cirr_dataset", "cirr")
_PICTURES = ("cirr", "images", "img_raw", "cirr/images", "cirr/img_raw")


def load_cirr(
    root: str,
    split: str = "val",
    gallery_ids: Sequence[str] | None = None,
    *,
    targets: Literal["hard", "soft"] = "hard",
    reference: Literal["removed", "kept"] = "removed",
) -> Benchmark:
    """Load the val or test1 split. test1's answers are the test server's: it has no targets.

    targets: "hard" counts `target_hard` alone; "soft" scores a result list by the best value of `target_soft`
        in it, from -1 (never counted below 0) to 1, as CIRPLANT's evaluation does.
    reference: "removed" takes a query's reference out of its own ranking, as CIRR's server does.

    Other galleries in use (8,102 dev images, all 21.5 thousand) can be given as gallery_ids; their scores do
    not compare. An empty caption (test1 has one) is a valid query.
    """
    choose("cirr", "split", split, SPLITS)
    choose("cirr", "targets", targets, ("hard", "soft"))
    choose("cirr", "reference", reference, ("removed", "kept"))
    base, captions = _find(root, f"captions/cap.rc2.{split}.json", split)
    _, listing = _find(root, f"image_splits/split.rc2.{split}.json", split)
    rows = read_rows(captions)
    queries = tuple(_query(row, has_target=split == "val") for row in rows)
    paths = _read_split(listing)
    rule: Literal["any", "soft"] = "soft" if targets == "soft" else "any"
    soft = _soft_targets(rows, removed=reference == "removed") if rule == "soft" and split == "val" else {}
    gallery = tuple(paths) if gallery_ids is None else explicit_gallery("cirr", gallery_ids)
    return Benchmark(
        name="cirr",
        split=split,
        queries=queries,
        gallery_ids=gallery,
        protocol={
            "annotations": "rc2",
            "gallery": f"split.rc2.{split}.json" if gallery_ids is None else "explicit",
            "gallery_size": len(gallery),
            "reference": reference,
            "targets": targets,
            "recall_counts": RECALL_RULES[rule],
            "subset": f"the query's group of six, its reference {reference}",
            **({"queries_without_reachable_soft_target": _unreachable(soft)} if soft else {}),
        },
        metrics=METRICS,
        headline=HEADLINE,
        has_targets=split == "val",
        recall=rule,
        soft_targets=soft,
        outside_references=gallery_ids is not None,
        images=ImageFiles(
            folders=(base, *(files.join(base, folder) for folder in _PICTURES)),
            source=f"{SOURCE} (pictures of NLVR2)",
            stems={name: path.removeprefix("./").rpartition(".")[0] for name, path in paths.items()},
        ),
    )


def _find(root: str, name: str, split: str) -> tuple[str, str]:
    places = [f"{base}:{inner}{name}" for base in _BASES for inner in ("cirr/", "")]
    return find_file(f"cirr {split}", root, places, source=SOURCE)


def _query(row: Row, *, has_target: bool) -> Query:
    reference = row.name("reference")
    members = row.row("img_set").names("members")
    if len(members) != 6 or reference not in members:
        raise row.fault("img_set", f"a group of six images with the reference {reference!r} among them")
    target = row.name("target_hard") if has_target else ""
    if has_target and target not in members:
        raise row.fault("target_hard", "a member of the query's group")
    return Query(
        query_id=row.name("pairid"),
        reference_id=reference,
        relative_caption=row.text("caption", may_be_empty=True),
        target_ids=(target,) if has_target else (),
        subset_ids=members,
    )


def _soft_targets(rows: Sequence[Row], *, removed: bool) -> dict[str, dict[str, float]]:
    """Each query's target_soft; without its reference (37 queries of val list it) where that is removed."""
    return {
        row.name("pairid"): {
            name: value
            for name, value in row.weights("target_soft").items()
            if not (removed and name == row.name("reference"))
        }
        for row in rows
    }


def _unreachable(soft: Mapping[str, Mapping[str, float]]) -> int:
    return sum(max(values.values(), default=0.0) <= 0 for values in soft.values())


def _read_split(uri: str) -> dict[str, str]:
    paths = files.read_json(uri)
    if not isinstance(paths, dict) or not paths or not all(isinstance(path, str) and path for path in paths.values()):
        raise CirError(f"{files.redact(uri)}: expected a JSON object of image name -> path, found {paths!r:.80}")
    return paths
