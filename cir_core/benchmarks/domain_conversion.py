"""Domain conversion on ImageNet-R, as in Pic2Word (Saito et al., CVPR 2023): a photo becomes a cartoon, an
origami, a toy or a sculpture of the same class.

    <base>/imgnet_real_query.txt    references, a line each: imgnet/real/<class>/<name>.JPEG <label>
    <base>/imgnet_targets.txt       gallery, a line each: imgnet/imagenet-r/<class>/<domain>_<number>.jpg <label>
    <base>/real/<class>/*.JPEG      pictures of ImageNet's validation set
    <base>/imagenet-r/<class>/*.jpg pictures of ImageNet-R

<base> is the root itself or imgnet, data/imgnet below it. Without a list its folder is read: every picture of
real/ whose class has a folder in imagenet-r/, and every picture of the four domains, sorted by path. An image
id is the path below <base> without its suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cir_core import files
from cir_core.benchmarks.annotations import choose, explicit_gallery
from cir_core.benchmarks.base import RECALL_RULES, Benchmark
from cir_core.benchmarks.images import SUFFIXES, ImageFiles
from cir_core.schema import CirError, Query

DOMAINS = ("cartoon", "origami", "toy", "sculpture")  # a listed label is 1000 * this place + class
SOURCE = "https://github.com/google-research/composed_image_retrieval (folder data/imgnet)"
PICTURES = "https://github.com/hendrycks/imagenet-r and ImageNet's validation set, in folders by class"
METRICS = ("recall@10", "recall@50")
_BASES = ("", "imgnet", "data/imgnet")


def load_domain_conversion(
    root: str,
    split: str = "val",
    gallery_ids: Sequence[str] | None = None,
    *,
    recall: Literal["set", "hit"] = "set",
    no_target: Literal["miss", "excluded"] = "miss",
    text: str = "a {domain} of",
) -> Benchmark:
    """Load the benchmark: every reference is asked for in each of the four domains. One split, "val".

    recall: "set" is Pic2Word's averaged set recall, the share of a query's targets among the first K; "hit"
        counts 1 where any of them is.
    no_target: some classes have no picture in some domain. "miss" counts such a query as 0, as Pic2Word does;
        "excluded" leaves it out. Either way the protocol holds the count.
    text: the relative caption, with {domain}; by default what Pic2Word's baselines encode.

    Pic2Word adds 1e-5 to the number of targets, which lowers its set recall by up to 1e-5 of its value.
    """
    choose("domain_conversion", "split", split, ("val",))
    choose("domain_conversion", "recall", recall, ("set", "hit"))
    choose("domain_conversion", "no_target", no_target, ("miss", "excluded"))
    if not isinstance(text, str) or "{domain}" not in text:
        raise CirError(f"domain_conversion: text must hold '{{domain}}', such as 'a {{domain}} of', not {text!r}")
    base = _find_base(root)
    if gallery_ids is None:
        gallery = _read(base, "imgnet_targets.txt", "imagenet-r")
    else:
        gallery = explicit_gallery("domain_conversion", gallery_ids)
    photos = _read(base, "imgnet_real_query.txt", "real")
    asked = _queries(photos, gallery, text)
    queries = tuple(query for query in asked if query.target_ids or no_target == "miss")
    rule: Literal["fraction", "any"] = "fraction" if recall == "set" else "any"
    return Benchmark(
        name="domain_conversion",
        split=split,
        queries=queries,
        gallery_ids=gallery,
        protocol={
            "gallery": "ImageNet-R, four domains" if gallery_ids is None else "explicit",
            "gallery_size": len(gallery),
            "reference": "kept",
            "photos_of_classes_without_gallery_images": len(photos) - len(asked) // len(DOMAINS),
            "recall": recall,
            "recall_counts": RECALL_RULES[rule],
            "no_target": no_target,
            "queries_without_target": sum(not query.target_ids for query in asked),
            "text": text,
        },
        metrics=METRICS,
        headline="recall@10",
        query_kinds={query.query_id: query.query_id.partition("/")[0] for query in queries},
        recall=rule,
        outside_references=True,
        empty_targets=no_target == "miss",
        images=ImageFiles(folders=(base,), source=PICTURES),
    )


def _find_base(root: str) -> str:
    for base in _BASES:
        folder = files.join(root, base) if base else root
        names = ("imgnet_targets.txt", "imagenet-r")
        if any(files.exists(files.join(folder, name)) for name in names):
            return folder
    raise CirError(
        f"domain_conversion: neither {files.redact(files.join(root, 'imgnet_targets.txt'))} nor a folder imagenet-r "
        f"is there, nor below {', '.join(_BASES[1:])}; get the lists from {SOURCE}, the pictures from {PICTURES}"
    )


def _read(base: str, listing: str, folder: str) -> tuple[str, ...]:
    """Return the image ids of a list, or of its folder where there is no list."""
    uri = files.join(base, listing)
    if files.exists(uri):
        lines = files.read_bytes(uri).decode(errors="replace").splitlines()
        return tuple(
            _id_from(line, folder, f"{files.redact(uri)}, line {n}") for n, line in enumerate(lines, 1) if line
        )
    pictures = files.join(base, folder)
    if not files.is_folder(pictures):
        raise CirError(
            f"domain_conversion: neither {files.redact(uri)} nor the folder {files.redact(pictures)} is there; get the "
            f"list from {SOURCE}, the pictures from {PICTURES}"
        )
    names = sorted(file.name for file in files.list_files(pictures) if file.name.lower().endswith(SUFFIXES))
    ids = [f"{folder}/{name.rpartition('.')[0]}" for name in names if name.count("/") == 1]
    return tuple(name for name in ids if folder == "real" or _domain_of(name) in DOMAINS)


def _id_from(line: str, folder: str, where: str) -> str:
    path, _, label = line.strip().rpartition(" ")
    parts = path.split("/")
    if len(parts) < 3 or parts[-3] != folder or not label.isdecimal() or "." not in parts[-1]:
        raise CirError(f"{where}: expected '.../{folder}/<class>/<picture> <label>', found {line!r:.80}")
    name = "/".join(parts[-3:]).rpartition(".")[0]
    place = int(label) // 1000
    if folder != "real" and (place >= len(DOMAINS) or DOMAINS[place] != _domain_of(name)):
        raise CirError(
            f"{where}: label {label} does not mean the domain of {parts[-1]!r}; domains: {', '.join(DOMAINS)}"
        )
    return name


def _class_of(image_id: str) -> str:
    return image_id.split("/")[-2] if image_id.count("/") else ""


def _domain_of(image_id: str) -> str:
    return image_id.rpartition("/")[2].rpartition("_")[0]


def _queries(photos: Sequence[str], gallery: Sequence[str], text: str) -> list[Query]:
    """Every photo of a class that the gallery shows, in every domain; domains one after the other."""
    targets: dict[tuple[str, str], list[str]] = {}
    for name in gallery:
        targets.setdefault((_class_of(name), _domain_of(name)), []).append(name)
    classes = {name for name, _ in targets}
    return [
        Query(
            query_id=f"{domain}/{photo.partition('/')[2]}",
            reference_id=photo,
            relative_caption=text.replace("{domain}", domain),
            target_ids=tuple(targets.get((_class_of(photo), domain), ())),
        )
        for domain in DOMAINS
        for photo in photos
        if _class_of(photo) in classes
    ]
