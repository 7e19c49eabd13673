"""Scenes on disk: image-text shards for training, and a benchmark folder for composed retrieval.

<root>/<split>/gallery/NNNNN.tar    image-text shards, key = gallery id
<root>/<split>/queries.jsonl        query_id, reference, relative_caption, target_ids, kind
<root>/<split>/benchmark.json       written last: a folder without it is unfinished
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator

from cir_core import files
from cir_core.scenes.captions import describe
from cir_core.scenes.model import Scene, random_scene, seeded
from cir_core.scenes.queries import KINDS, ComposedScene, compose_query
from cir_core.scenes.render import encode_image, render
from cir_core.schema import CirError
from cir_core.shards import write_parquet_shard, write_tar_shard

VERSION = 1  # of the generator: the same seed and version give the same bytes
_WRITERS = {"tar": write_tar_shard, "parquet": write_parquet_shard}
Row = tuple[str, bytes, str, str]  # key, image bytes, suffix, caption


def _pairs(seed: int, first: int, last: int) -> Iterator[Row]:
    for index in range(first, last):
        rng = seeded("pair", seed, index)
        scene = random_scene(rng)
        caption = describe(scene, rng)
        yield f"{index:09d}", encode_image(render(scene, rng)), "jpg", caption


def write_pairs(
    uri: str,
    num_pairs: int,
    *,
    seed: int = 0,
    shard_rows: int = 1000,
    shard_format: str = "tar",
    only: int | None = None,
) -> list[str]:
    """Write image-text pairs as shards `NNNNN.tar` or `NNNNN.parquet` and return their URIs.

    Args:
        uri: folder for the shards, any URI.
        num_pairs: how many pictures with captions.
        seed: pair i depends on (seed, i) alone.
        shard_rows: pairs per shard; the last one takes what is left.
        shard_format: "tar" or "parquet".
        only: write just the shard of this number, so that several processes can share the work.

    Raises:
        CirError: a count below one or an unknown format.
    """
    if shard_format not in _WRITERS:
        raise CirError(f"shard_format must be one of {sorted(_WRITERS)}, not {shard_format!r}")
    if num_pairs < 1 or shard_rows < 1:
        raise CirError(f"num_pairs and shard_rows must be at least 1, not {num_pairs} and {shard_rows}")
    shards = []
    for number, first in enumerate(range(0, num_pairs, shard_rows)):
        shards.append(files.join(uri, f"{number:05d}.{shard_format}"))
        if only in (None, number):
            _WRITERS[shard_format](shards[-1], _pairs(seed, first, min(first + shard_rows, num_pairs)))
    return shards


def _gallery_scenes(queries: list[ComposedScene]) -> list[Scene]:
    scenes = []
    for query in queries:
        scenes += [query.reference, query.target, *query.image_distractors, *query.text_distractors]
    return scenes


def _gallery_rows(split: str, seed: int, scenes: list[Scene], first: int, last: int) -> Iterator[Row]:
    for index in range(first, last):
        rng = seeded("gallery", split, seed, index)
        caption = describe(scenes[index], rng)
        yield f"{split}-{index:06d}", encode_image(render(scenes[index], rng)), "jpg", caption


def write_benchmark(root: str, split: str, num_queries: int, *, seed: int = 0, shard_rows: int = 1000) -> str:
    """Write a composed-retrieval benchmark of `num_queries` queries and eleven gallery pictures a query.

    Every query brings its reference, its target, six pictures near the reference that do not do what the sentence
    asks, and three that show what it asks for elsewhere. Every gallery picture that shows exactly the target's
    scene is a target, also one that another query brought in; the query's own comes first.

    Args:
        root: folder; the benchmark goes to `<root>/<split>`.
        split: names the split and seeds it: splits share no picture.
        num_queries: queries, the four kinds in turn.
        seed: with `split`, the source of every choice.
        shard_rows: pictures per gallery shard.

    Returns:
        URI of the split's folder.
    """
    if num_queries < 1:
        raise CirError(f"num_queries must be at least 1, not {num_queries}")
    rng = seeded("queries", split, seed, VERSION)
    composed = [compose_query(rng, KINDS[index % len(KINDS)]) for index in range(num_queries)]
    scenes = _gallery_scenes(composed)
    order = list(range(len(scenes)))
    rng.shuffle(order)  # so that a gallery index says nothing about the picture's part in a query
    place = {old: new for new, old in enumerate(order)}
    shown = [scenes[old] for old in order]
    holders: dict[Scene, list[int]] = defaultdict(list)
    for index, scene in enumerate(shown):
        holders[scene].append(index)
    per_query = len(scenes) // num_queries
    lines = []
    for number, query in enumerate(composed):
        reference, target = place[number * per_query], place[number * per_query + 1]
        targets = [target, *(index for index in holders[query.target] if index != target)]
        line = {
            "query_id": f"{split}-q{number:05d}",
            "reference": f"{split}-{reference:06d}",
            "relative_caption": query.relative_caption,
            "target_ids": [f"{split}-{index:06d}" for index in targets],
            "kind": query.kind,
        }
        lines.append(json.dumps(line))
    folder = files.join(root, split)
    for number, first in enumerate(range(0, len(shown), shard_rows)):
        rows = _gallery_rows(split, seed, shown, first, min(first + shard_rows, len(shown)))
        write_tar_shard(files.join(folder, "gallery", f"{number:05d}.tar"), rows)
    files.write_bytes(files.join(folder, "queries.jsonl"), ("\n".join(lines) + "\n").encode())
    summary = {
        "name": "scenes",
        "version": VERSION,
        "seed": seed,
        "num_gallery": len(shown),
        "num_queries": num_queries,
        "gallery_ids": [f"{split}-{index:06d}" for index in range(len(shown))],
    }
    files.write_json(files.join(folder, "benchmark.json"), summary)
    return folder
