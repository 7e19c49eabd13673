"""FashionIQ (Wu et al., CVPR 2021): dresses, shirts and tops, two captions a query, one category at a time.

    <base>/captions/cap.<category>.<split>.json          queries; or <base>/json/...
    <base>/image_splits/split.<category>.<split>.json    gallery
    <base>/images/*.png|jpg                              pictures; or straight below <base>

<base> is the root itself or fashionIQ_dataset, FashionIQ, fashion-iq, fashioniq below it (CLIP4Cir's,
SEARLE's and Pic2Word's layouts). The usual score is the unweighted mean over the three categories
(`evaluation.mean_of_results`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from cir_core import files
from cir_core.benchmarks.annotations import (
    Row,
    choose,
    explicit_gallery,
    find_file,
    read_ids,
    read_rows,
)
from cir_core.benchmarks.base import RECALL_RULES, Benchmark
from cir_core.benchmarks.images import ImageFiles
from cir_core.schema import CirError, Query

SPLITS = ("val", "test")
CATEGORIES = ("dress", "shirt", "toptee")
SOURCE = "https://github.com/XiaoxiaoGuo/fashion-iq"
PICTURES = "https://github.com/hongwang600/fashion-iq-metadata"
HEADLINE = "recall@10"
METRICS = ("recall@10", "recall@50", "recall@1", "recall@5", "pessimistic_recall@10")
CaptionJoin = Literal["and", "reversed", "averaged", "comma", "capitalized", "separate"]
_BASES = ("", "fashionIQ_dataset", "FashionIQ", "fashion-iq", "fashioniq")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:].lower()  # str.capitalize, as CLIP4Cir


# Each join turns the two captions into texts: one; several to average; or one per query ("separate").
CAPTION_JOINS: dict[str, tuple[str, Callable[[str, str], tuple[str, ...]]]] = {
    "and": ("{c1} and {c2}", lambda one, two: (f"{one} and {two}",)),
    "reversed": ("{c2} and {c1}", lambda one, two: (f"{two} and {one}",)),
    "averaged": (
        "the mean embedding of {c1} and {c2}, {c2} and {c1}",
        lambda one, two: (f"{one} and {two}", f"{two} and {one}"),
    ),
    "comma": ("{c1}, {c2}", lambda one, two: (f"{one}, {two}",)),
    "capitalized": ("{C1} and {c2}, C1 with a capital", lambda one, two: (f"{_capital(one)} and {two}",)),
    "separate": ("{c1}; {c2}: one query per caption", lambda one, two: (one, two)),
}


def load_fashioniq(
    root: str,
    split: str = "val",
    gallery_ids: Sequence[str] | None = None,
    *,
    category: Literal["", "dress", "shirt", "toptee"] = "",
    gallery: Literal["original", "val"] = "original",
    caption_join: CaptionJoin = "and",
    reference: Literal["kept", "removed"] = "kept",
) -> Benchmark:
    """Load one category of the val split, or of test, whose answers are not public (it has no targets).

    category: needed. gallery: "original" is the split file; "val" the union of all references and targets of
        the split, in the split file's order: clearly easier.
    caption_join: how the two captions become the text, a key of CAPTION_JOINS. Each caption is first stripped
        of " .?,", as all published code does; an empty one (val has three) stays in its place.
    reference: "kept" leaves a query's reference in its ranking, the field's default.
    """
    choose("fashioniq", "split", split, SPLITS)
    choose("fashioniq", "category", category, CATEGORIES)
    choose("fashioniq", "gallery", gallery, ("original", "val"))
    choose("fashioniq", "caption_join", caption_join, get_args(CaptionJoin))
    choose("fashioniq", "reference", reference, ("kept", "removed"))
    places = [f"{base}:{inner}/cap.{category}.{split}.json" for base in _BASES for inner in ("captions", "json")]
    base, uri = find_file(f"fashioniq {category} {split}", root, places, source=SOURCE)
    rows = read_rows(uri)
    queries = _queries(rows, category, caption_join, has_targets=split == "val")
    if gallery_ids is None:
        ids = _gallery(base, category, split, queries if gallery == "val" else None)
    else:
        ids = explicit_gallery("fashioniq", gallery_ids)
    return Benchmark(
        name="fashioniq",
        split=split,
        queries=queries,
        gallery_ids=ids,
        protocol={
            "category": category,
            "gallery": gallery if gallery_ids is None else "explicit",
            "gallery_size": len(ids),
            "reference": reference,
            "caption_join": caption_join,
            "text": CAPTION_JOINS[caption_join][0],
            "empty_captions": sum(not caption for row in rows for caption in _captions(row)),
            "recall_counts": RECALL_RULES["any"],
        },
        metrics=METRICS,
        headline=HEADLINE,
        has_targets=split == "val",
        outside_references=gallery_ids is not None,
        images=ImageFiles((files.join(base, "images"), files.join(base, "images", category), base), PICTURES),
    )


def _queries(rows: Sequence[Row], category: str, caption_join: str, *, has_targets: bool) -> tuple[Query, ...]:
    queries = []
    for place, row in enumerate(rows):
        texts = CAPTION_JOINS[caption_join][1](*_captions(row))
        targets = (row.name("target"),) if has_targets else ()
        reference, query_id = row.name("candidate"), f"{category}-{place}"
        if caption_join == "separate":
            queries += [Query(f"{query_id}-{number}", reference, text, targets) for number, text in enumerate(texts)]
        else:
            queries.append(Query(query_id, reference, texts[0], targets, more_captions=texts[1:]))
    return tuple(queries)


def _captions(row: Row) -> tuple[str, str]:
    captions = row.texts("captions")
    if len(captions) != 2:
        raise row.fault("captions", "a list of two captions")
    return captions[0].strip(" .?,"), captions[1].strip(" .?,")


def _gallery(base: str, category: str, split: str, queries: Sequence[Query] | None) -> tuple[str, ...]:
    """Return the split file's images; with queries only those that they use."""
    places = [f":image_splits/split.{category}.{split}.json"]
    ids = read_ids(find_file(f"fashioniq {category} {split} gallery", base, places, source=SOURCE)[1])
    if queries is None:
        return ids
    if split != "val":
        raise CirError(f"fashioniq: gallery 'val' needs targets, which split {split!r} does not have; use 'original'")
    used = {name for query in queries for name in (query.reference_id, *query.target_ids)}
    if strange := used - set(ids):
        raise CirError(f"fashioniq {category} {split}: image {min(strange)!r} of a query is not in the split file")
    return tuple(name for name in ids if name in used)
