"""The benchmarks of one run: categories, tasks and galleries side by side, and the pictures their stores are made of."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from cir_core import files, scenes
from cir_core.benchmarks import Benchmark, load_benchmark, near_matches, protocol_options, read_captions
from cir_core.benchmarks.fashioniq import CATEGORIES
from cir_core.benchmarks.genecis import TASKS
from cir_core.composition import takes_alpha
from cir_core.evaluation import has_test_server
from cir_core.schema import CirError
from jobs.decoding import Picture
from jobs.embedder import Unit
from jobs.embedding import find_units, picture_units
from jobs.session import say
from jobs.storage import absolute

if TYPE_CHECKING:
    from jobs.batch_retrieve import BatchRetrieveConfig

# The option whose values make one score together, their unweighted mean; all of them where the user names none.
AVERAGED = {"fashioniq": ("category", CATEGORIES), "genecis": ("task", TASKS)}


@dataclass(frozen=True)
class Part:
    """One benchmark of a run.

    label: tells it from the run's other parts; "" if it is alone. group: the same for parts that are averaged.
    selected: the split on which alpha is chosen, None where alpha is given.
    """

    label: str
    group: str
    reported: Benchmark
    selected: Benchmark | None

    def below(self, folder: str) -> str:
        """Return the part's own folder below a run's: the run's itself where the part is alone."""
        return files.join(folder, self.label.replace(" ", "-")) if self.label else folder


def combinations(benchmark: str, protocol: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (label, group, options) of every part: an option that is a list takes each of its values.

    >>> combinations("fashioniq", {"category": ["dress", "shirt"], "gallery": "val"})[1]
    ('shirt', '', {'category': 'shirt', 'gallery': 'val'})
    """
    known = protocol_options(benchmark)
    for name in protocol:
        if name not in known:
            raise CirError(f"protocol: unknown option {name!r} of {benchmark}; {near_matches(name, known)}")
    options = dict(protocol)
    averaged, values = AVERAGED.get(benchmark, ("", ()))
    if averaged and averaged not in options:
        options = {averaged: list(values), **options}
    axes = {name: value for name, value in options.items() if isinstance(value, list)}
    for name, value in axes.items():
        if not value or len({str(item) for item in value}) != len(value):
            raise CirError(f"protocol: {name} must list at least one value, none twice; found {value!r}")
    found = []
    for chosen in itertools.product(*axes.values()):
        picked = dict(zip(axes, chosen, strict=True))
        varied = {name: str(value) for name, value in picked.items() if len(axes[name]) > 1}
        group = " ".join(value for name, value in varied.items() if name != averaged)
        found.append((" ".join(varied.values()), group, {**options, **picked}))
    if len({label.replace(" ", "-") for label, _, _ in found}) < len(found):
        raise CirError(f"protocol: two of {[label for label, _, _ in found]} would share a folder; run them apart")
    return found


def find_parts(config: BatchRetrieveConfig) -> list[Part]:
    """Load every part's benchmarks from their annotation files, generating scenes first where they are absent."""
    chosen = config.alpha is None and any(map(takes_alpha, config.compared))
    select = (config.select_split or config.reported_split) if chosen else ""
    splits = list(dict.fromkeys([config.reported_split, select or config.reported_split]))
    root = absolute(config.root) if config.root else _scenes_root(config, splits)
    gallery = _gallery_ids(config.gallery_ids) if config.gallery_ids else None
    parts = []
    for label, group, options in combinations(config.benchmark, config.protocol):
        found = {
            split: load_benchmark(config.benchmark, root, split, gallery_ids=gallery, **options) for split in splits
        }
        reported, selected = found[config.reported_split], found[select] if select else None
        if selected is not None and not selected.has_targets:
            raise CirError(
                f"{selected}: its answers are not public, so alpha cannot be chosen on it: set --alpha, or --select_split "
                "to a split with answers"
            )
        parts.append(Part(label, group, reported, selected))
    for benchmark in (item for part in parts for item in (part.reported, part.selected) if item is not None):
        _check_feasible(config, benchmark)
    return parts


def _check_feasible(config: BatchRetrieveConfig, benchmark: Benchmark) -> None:
    """Raise CirError for what would show only after the search."""
    needed = min(benchmark.max_k, len(benchmark.gallery_ids))
    if config.k < needed and not benchmark.own_galleries:
        raise CirError(f"--k {config.k} is too short for {benchmark.metrics}: use at least {needed}")
    if has_test_server(benchmark) and benchmark.name == "cirr" and not benchmark.reference_removed:
        raise CirError(
            f"{benchmark}: its test server refuses references in the lists; leave protocol reference removed"
        )


def _scenes_root(config: BatchRetrieveConfig, splits: Sequence[str]) -> str:
    if config.benchmark != "scenes":
        raise CirError(f"--root is needed: the folder that holds benchmark {config.benchmark!r}")
    folder = f"scenes-benchmark-{config.num_queries}-seed{config.seed}"
    root = files.join(absolute(config.storage_path), "data", folder)
    if strange := [split for split in splits if split not in ("val", "test")]:
        raise CirError(f"scenes: the generated splits are val and test, not {strange[0]!r}")
    missing = [split for split in splits if not files.exists(files.join(root, split, "benchmark.json"))]
    if missing:
        say(f"generating {config.num_queries} composed queries each for {' and '.join(missing)} in {root}")
    write = ray.remote(num_cpus=1)(scenes.write_benchmark)
    ray.get([write.remote(root, split, config.num_queries, seed=config.seed) for split in missing])
    return root


def _gallery_ids(uri: str) -> list[str]:
    """Read image ids: a JSON list, or one a line."""
    if files.redact(uri).lower().endswith(".json"):
        ids: list[str] = files.read_json(uri)
        return ids  # load_benchmark checks them
    try:
        return [line.strip() for line in files.read_bytes(uri).decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise CirError(
            f"{files.redact(uri)}: expected image ids in UTF-8, one a line, or a JSON list in a .json"
        ) from None


@dataclass(frozen=True)
class ImageSource:
    """What one store is made of. captions: as in EmbedPlan."""

    units: tuple[Unit, ...]
    digest: str
    captions: str


class ImageSources:
    """The stores that a run's benchmarks need; a gallery inside another one shares its store."""

    def __init__(self, config: BatchRetrieveConfig) -> None:
        self.missing = config.missing_images
        self.composed = config.gallery_alpha > 0
        if config.gallery_captions and not self.composed:
            raise CirError("--gallery_captions does nothing without --gallery_alpha")
        self.captions = read_captions(config.gallery_captions) if config.gallery_captions else None
        self.sources: list[ImageSource] = []
        self._pictures: list[dict[str, Picture]] = []

    def add(self, benchmark: Benchmark) -> int:
        """Return the place in `sources` of the store that holds a benchmark's images.

        Raises:
            CirError: a picture is missing (unless missing pictures are to be left out), or the gallery is to be composed
                and carries no captions.
        """
        if benchmark.image_shards:
            if self.captions is not None:
                raise CirError(f"--gallery_captions: the shards of {benchmark} bring their own captions; leave it out")
            return self._add_shards(benchmark)
        if self.composed and self.captions is None:
            raise CirError(f"--gallery_alpha: the pictures of {benchmark} carry no captions; give --gallery_captions")
        found = benchmark.image_files(missing=self.missing)
        texts = self.captions or {}
        pictures = {
            name: Picture(name, file.uri, benchmark.crops.get(name), texts.get(name, ""))
            for name, file in found.items()
        }
        if self.captions is not None and not any(picture.caption for picture in pictures.values()):
            raise CirError(
                f"--gallery_captions: none of its ids is an image of {benchmark}, such as {next(iter(pictures))!r}"
            )
        for number, held in enumerate(self._pictures):
            if pictures.items() <= held.items() and self._same_order(number, benchmark):
                return number
        units, digest = picture_units(list(pictures.values()), found)
        self._remember(ImageSource(tuple(units), digest, "no" if self.captions is None else "embed"), pictures)
        return len(self.sources) - 1

    def captioned(self, benchmark: Benchmark) -> dict[str, object]:
        """Return how many images of a gallery have one of the given captions, for the protocol."""
        if self.captions is None:
            return {}
        return {"gallery_captioned": sum(bool(self.captions.get(name)) for name in benchmark.gallery_ids)}

    def _add_shards(self, benchmark: Benchmark) -> int:
        units, digest = find_units(benchmark.image_shards)
        source = ImageSource(tuple(units), digest, "embed" if self.composed else "text")
        if source not in self.sources:
            self._remember(source, {})
        return self.sources.index(source)

    def _same_order(self, number: int, benchmark: Benchmark) -> bool:
        places = {name: place for place, name in enumerate(self._pictures[number])}
        rows = [places[name] for name in benchmark.gallery_ids if name in places]
        return bool((np.diff(rows) > 0).all())

    def _remember(self, source: ImageSource, pictures: dict[str, Picture]) -> None:
        self.sources.append(source)
        self._pictures.append(pictures)
