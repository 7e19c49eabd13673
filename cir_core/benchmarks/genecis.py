"""GeneCIS (Vaze et al., CVPR 2023): four tasks, each query with a small gallery of its own.

    <base>/<task>.json                 focus_attribute, change_attribute, focus_object, change_object
    <root>/val2017/*.jpg               pictures of the object tasks: COCO val2017
    <root>/VG_100K_all/*.jpg           pictures of the attribute tasks: Visual Genome 1.2; or VG_100K and VG_100K_2

<base> is the root itself or genecis, GeneCIS, genecis/genecis below it. The usual score is the mean recall@1
over the four tasks (`evaluation.mean_of_results`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cir_core import files
from cir_core.benchmarks.annotations import Row, choose, explicit_gallery, find_file, read_rows
from cir_core.benchmarks.base import RECALL_RULES, Benchmark
from cir_core.benchmarks.images import Crop, ImageFiles
from cir_core.schema import Query

TASKS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
SOURCE = "https://github.com/facebookresearch/genecis"
HEADLINE = "recall@1"
METRICS = ("recall@1", "recall@2", "recall@3")
DILATION = 0.7  # of the published code
_BASES = ("", "genecis", "GeneCIS", "genecis/genecis", "GeneCIS/genecis")
_FOLDERS = {
    False: ("val2017", "coco/val2017", "COCO/val2017", "coco2017/val2017", "COCO2017/val2017"),
    True: ("VG_100K_all", "VG_100K", "VG_100K_2", "VG/VG_100K", "VG/VG_100K_2"),
}
_PICTURES = {
    False: "http://images.cocodataset.org/zips/val2017.zip",
    True: "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html (version 1.2)",
}
_DILATIONS = {"dilated": DILATION, "tight": 0.0}


def load_genecis(
    root: str,
    split: str = "val",
    gallery_ids: Sequence[str] | None = None,
    *,
    task: Literal["", "focus_attribute", "change_attribute", "focus_object", "change_object"] = "",
    crop: Literal["dilated", "tight", "whole"] = "dilated",
) -> Benchmark:
    """Load one task; GeneCIS has one split, called "val" here.

    task: needed. crop: what is embedded of a picture of the attribute tasks: the object's box "dilated" by
        0.7 of its size to the left and the top and padded with black to a square, as the published code does;
        the box alone, padded too ("tight"); or the "whole" picture. The object tasks take whole pictures.

    The target is stored first among a query's images, so any rule that lets it win a tie scores a constant
    model at 100 %: a tie counts against the target here. A distractor that is the target's own picture (one
    query of change_object) is left out and counted in the protocol. An image id is the picture's number, and
    for a crop its box too, "<number>_<x>_<y>_<width>_<height>".
    """
    choose("genecis", "split", split, ("val",))
    choose("genecis", "task", task, TASKS)
    choose("genecis", "crop", crop, (*_DILATIONS, "whole"))
    base, uri = find_file(f"genecis {task}", root, [f"{base}:{task}.json" for base in _BASES], source=SOURCE)
    attribute = task.endswith("attribute")
    images = _Images(attribute, None if crop == "whole" else _DILATIONS[crop])
    rows = read_rows(uri)
    queries = tuple(_query(row, f"{task}-{place}", images) for place, row in enumerate(rows))
    repeated = sum(1 + len(row.rows("gallery")) for row in rows) - sum(len(query.subset_ids) for query in queries)
    union = tuple(dict.fromkeys(name for query in queries for name in query.subset_ids))
    gallery = union if gallery_ids is None else explicit_gallery("genecis", gallery_ids)
    sizes = sorted({len(query.subset_ids) for query in queries})
    places = [files.join(folder, inner) for folder in dict.fromkeys((root, base)) for inner in _FOLDERS[attribute]]
    return Benchmark(
        name="genecis",
        split=split,
        queries=queries,
        gallery_ids=gallery,
        protocol={
            "task": task,
            "gallery": f"each query's own, of {' or '.join(map(str, sizes))} images",
            "gallery_size": len(gallery),
            "repeated_images_left_out": repeated,
            "reference": "kept",
            "crop": crop if attribute else "whole",
            "recall_counts": RECALL_RULES["any"],
        },
        metrics=METRICS,
        headline=HEADLINE,
        ties="against_target",
        own_galleries=True,
        outside_references=True,
        images=ImageFiles(folders=tuple(places), source=_PICTURES[attribute], stems=images.stems),
        crops=images.crops,
    )


def _query(row: Row, query_id: str, images: _Images) -> Query:
    target = images.id_of(row.row("target"))
    own = dict.fromkeys([target, *map(images.id_of, row.rows("gallery"))])
    reference = images.id_of(row.row("reference"))
    return Query(query_id, reference, row.text("condition", may_be_empty=True), (target,), tuple(own))


class _Images:
    """Names the images of a task, and collects where their pictures lie and what is cut out of them."""

    def __init__(self, attribute: bool, dilation: float | None) -> None:
        """attribute: whether the task has boxes. dilation: of a box; None takes the whole picture."""
        self.attribute, self.dilation = attribute, dilation
        self.stems: dict[str, str] = {}
        self.crops: dict[str, Crop] = {}

    def id_of(self, image: Row) -> str:
        """Return the id of one entry: its picture's number, with its box where that is cut out."""
        if not self.attribute:
            name = image.name("val_image_id")
            self.stems[name] = name.zfill(12)
            return name
        picture = image.name("image_id")
        if self.dilation is None:
            self.stems[picture] = picture
            return picture
        box = image.numbers("instance_bbox")
        if len(box) != 4 or min(box[2:]) <= 0:
            raise image.fault("instance_bbox", "[left, top, width, height] of some size")
        name = "_".join([picture, *(f"{number:g}" for number in box)])
        self.stems[name] = picture
        self.crops[name] = Crop(*box, dilation=self.dilation, pad_square=True)
        return name
