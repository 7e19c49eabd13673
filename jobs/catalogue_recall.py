"""What approximate search misses: a sample of a catalogue run's own queries, searched exactly too.

Which queries are compared is decided by the seed and the number of queries. A part with some of them keeps their
embeddings and the lists found, `sample/part-00000.safetensors`, before its marker, so a run that is killed goes on; the
lists are compared at the end, by one exact pass for the whole sample. Without that nothing is committed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from safetensors.torch import load, save

from cir_core import files
from cir_core.schema import CirError
from cir_core.search import TopK
from cir_core.search.approximate import recall_of_exact, wilson_interval
from jobs.gallery_search import Gallery, GallerySearch, Setting, Tile
from jobs.session import say

if TYPE_CHECKING:
    from jobs.catalogue import Prepared


def sample_sizes(part_sizes: Sequence[int], size: int, seed: int) -> dict[int, int]:
    """Return how many queries of each part are compared: a draw of `size` among all, without replacement.

    >>> sample_sizes([5, 0, 3], 100, 0)
    {0: 5, 2: 3}
    """
    ends = np.cumsum(part_sizes)
    chosen = np.random.default_rng(seed).choice(int(ends[-1]), min(size, int(ends[-1])), replace=False)
    parts, counts = np.unique(np.searchsorted(ends, chosen, side="right"), return_counts=True)
    return dict(zip(parts.tolist(), counts.tolist(), strict=True))


@ray.remote(num_cpus=1, max_retries=5)
def save_sample(
    uri: str, size: int, seed: Sequence[int], tile: Tile, prepared: Prepared, answers: dict[Setting, TopK]
) -> int:
    """Keep the embeddings and lists of `size` answered queries of a part; return how many there were."""
    answered = np.flatnonzero(prepared.kept)
    chosen = np.random.default_rng(seed).choice(answered, min(size, len(answered)), replace=False)
    rows = torch.from_numpy(np.sort(chosen))
    tensors = {
        "images": tile.images[rows],
        "texts": tile.texts[rows],
        "exclude": torch.tensor(tile.exclude)[rows],
        "found": torch.stack([answer.indices[rows] for answer in answers.values()]),  # [settings, q, k]
    }
    files.write_bytes(uri, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    return len(rows)


def sample_uri(folder: str, number: int) -> str:
    """Return where a part's share of the sample lies."""
    return files.join(folder, "sample", f"part-{number:05d}.safetensors")


def measure_recall(
    gallery: Gallery, folder: str, parts: Sequence[int], settings: Sequence[Setting], *, k: int, num_shards: int
) -> dict[str, Any]:
    """Search the sample exactly and compare; the same sample is measured once.

    Args:
        gallery: what was searched.
        folder: the run's.
        parts: those that have some of the sample.
        settings: methods and alphas, in the order of the run.
        k: length of the lists.
        num_shards: tasks of the exact search.

    Returns:
        num_sampled, and for each setting, in order, {recall_of_exact@k: [mean, low, high]}.
    """
    contents = [files.read_bytes(sample_uri(folder, number)) for number in parts]
    if not contents:
        raise CirError(
            "none of the queries sampled to measure recall could be answered, so nothing is reported; choose another "
            "--seed or more --recall_queries"
        )
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
    recorded = files.join(folder, "recall.json")
    if files.exists(recorded):
        before = files.read_json(recorded)
        if isinstance(before, dict) and before.get("sample") == digest:
            return {key: before[key] for key in ("num_sampled", "recall")}
    loaded = [load(content) for content in contents]
    sample = {name: torch.cat([one[name] for one in loaded], dim=int(name == "found")) for name in loaded[0]}
    tile = Tile(sample["images"], sample["texts"], sample["exclude"].tolist())
    started = time.perf_counter()
    exact = ray.get(GallerySearch(gallery, num_shards, num_tiles=1).start(tile, list(settings), k))
    say(
        f"exact search of {len(tile.exclude)} sampled queries, to measure recall: {time.perf_counter() - started:.1f} s"
    )
    recall = [_compared(found, exact[key].indices, k) for key, found in zip(settings, sample["found"], strict=True)]
    result = {"num_sampled": len(tile.exclude), "recall": recall}
    files.write_json(recorded, {"sample": digest, **result})
    return result


def _compared(found: torch.Tensor, exact: torch.Tensor, k: int) -> dict[str, list[float]]:
    """Return {recall_of_exact@depth: [mean, low, high]} at 1, 10 and k."""
    measured = {}
    for depth in sorted({1, 10, k}):
        if depth <= k:
            interval = wilson_interval(recall_of_exact(found, exact, depth))
            measured[f"recall_of_exact@{depth}"] = [interval.mean, interval.low, interval.high]
    return measured
