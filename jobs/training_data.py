"""Image-text shards to training batches: index once, then stream every epoch through Ray Data in a planned order.

Two operators: a reader task fetches one round of the plan (ranged reads, shuffle) and sends out one row per step and
worker; decoding tasks turn each row's encoded images into one uint8 tensor. With text anchors (jobs/text_anchors.py) the
reader fetches them too, and they travel in place of the captions as float32[D] lists and one float32 tensor. A row is a worker's whole batch of one
step, and a block is one row, so Ray Data's splitter, which deals blocks out to the worker with the fewest rows, hands
each worker its part of every step; `step` travels with the row and the training loop refuses any other than the next.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data import DataIterator, Dataset, TaskPoolStrategy
from ray.train import DataConfig

from cir_core import files
from cir_core.embedding_store import listing_digest
from cir_core.epoch_plan import EpochPlan, Piece, plan_epoch, rows_per_worker
from cir_core.preprocessing import ImageError, Preprocessing, preprocess_image
from cir_core.schema import Reject
from cir_core.shards import Sample, ShardIndex, Slice, index_shard, read_slice, shard_versions
from jobs.progress import count_storage_retries
from jobs.session import pace, retry_network_errors, say
from jobs.text_anchors import TextAnchors

Batches = Iterator[tuple[dict[str, Any], dict[str, Any]]]
Anchors = npt.NDArray[np.float32]
_T = TypeVar("_T")
READER_CPUS = 0.25  # a reader waits for storage most of its time
_SLICE_ROWS = 256
_INDEX_READERS = 16  # requests in flight while the counts of thousands of shards are fetched
_PIECE_READERS = 4  # ranged reads in flight while a round is fetched
_ROUND_BYTES = 1 << 30  # of encoded images that a reader holds; ImageNet's 110 kB at batch 1024 are 8 steps of 115 MB
DECODER_CPUS = 0.75  # decoding takes a core while it runs; one worker, one reader, one decoder fit two cores


def index_shards(shards: Sequence[str], storage_uri: str, *, slice_rows: int = _SLICE_ROWS) -> list[ShardIndex]:
    """Count and cut all shards, in parallel on the cluster.

    The counts are kept in `<storage_uri>/index/<hash of the listing>/`, a file per shard, so that another run over the same
    shards counts only what is missing.

    Raises:
        CirError: a shard that cannot be read at all; the message names it.
    """
    listed = listing_digest(shard_versions(shards))
    cache_uri = files.join(storage_uri, "index", f"{listed[:16]}-{slice_rows}")
    known = {item.uri for item in files.list_files(cache_uri)} if files.exists(cache_uri) else set()
    caches = [files.join(cache_uri, f"{number:06d}.json") for number in range(len(shards))]
    missing = [number for number, cache in enumerate(caches) if cache not in known]

    # not more at once than cores: each process costs seconds to start
    @ray.remote(num_cpus=1, max_retries=3, retry_exceptions=[OSError])
    def count(shard: str, cache: str) -> None:
        files.write_json(cache, asdict(index_shard(shard, slice_rows=slice_rows)))

    waiting = [count.remote(shards[number], caches[number]) for number in missing]
    total = len(waiting)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=10)
        ray.get(done)
        if waiting and total > 8:
            say(f"counting shards: {total - len(waiting)} of {total}")
    with ThreadPoolExecutor(_INDEX_READERS) as pool:
        return list(pool.map(_read_index, caches, shards))


def _read_index(cache: str, shard: str) -> ShardIndex:
    stored = files.read_json(cache)
    slices = tuple(
        Slice(**{**part, "skip": tuple(part["skip"]), "files": tuple(part["files"])}) for part in stored["slices"]
    )
    rejects = tuple(Reject(**reject) for reject in stored["rejects"])
    return ShardIndex(shard, stored["num_samples"], slices, rejects, stored["size_bytes"])


@dataclass(frozen=True)
class RunPlan:
    """The epochs of a run as one sequence of steps and rounds. All epochs have the same number of each.

    anchors: where to read the captions' embeddings; None: captions travel, and each worker embeds its own.
    """

    indexes: tuple[ShardIndex, ...]
    global_batch_size: int
    seed: int
    epochs: int
    steps_per_round: int = 8
    anchors: TextAnchors | None = None

    def epoch(self, epoch: int) -> EpochPlan:
        """Return the plan of one epoch."""
        return plan_epoch(
            self.indexes,
            global_batch_size=self.global_batch_size,
            steps_per_round=self.steps_per_round,
            seed=self.seed,
            epoch=epoch,
        )

    @property
    def num_rows(self) -> int:
        """Samples of one epoch."""
        return sum(index.num_samples for index in self.indexes)


def steps_in_memory(indexes: Sequence[ShardIndex], global_batch_size: int) -> int:
    """Return the steps of a round: as many as there may be, fewer where a reader would hold more than _ROUND_BYTES.

    Depends on the shards and the batch alone, as the order of the samples does.
    """
    num_samples = sum(index.num_samples for index in indexes)
    step_bytes = global_batch_size * sum(index.size_bytes for index in indexes) / max(1, num_samples)
    return max(1, min(RunPlan.steps_per_round, int(_ROUND_BYTES / max(1.0, step_bytes))))


def describe_large_groups(plan: EpochPlan) -> str:
    """Say how often an epoch reads what it trains on where Parquet row groups are far larger than a round; "" if none is.

    Rows are found by reading their row group from its start. Slices inside a group would be worse: each would do so.
    """
    round_rows = plan.steps_per_round * plan.global_batch_size
    largest = max(plan.slices, key=lambda part: part.num_rows)
    if largest.num_rows <= max(_SLICE_ROWS, 2 * round_rows):
        return ""
    read = sum(piece.stop for number in range(plan.num_rounds) for piece in plan.pieces(number))
    return (
        f"{files.redact(largest.shard)} has a row group of {largest.num_rows} rows; it is read from its start for each "
        f"{round_rows} of them, so an epoch reads about {read / plan.num_rows:.1f} times the data. Shards written with row "
        f"groups of {_SLICE_ROWS} rows train faster"
    )


def read_pairs(piece: Piece, anchors: TextAnchors | None) -> tuple[list[Sample], Anchors | None]:
    """Read the samples of a piece and, if there are any, their anchors float32[n, D]."""
    rows = read_slice(piece.slice)  # taken one by one: a Parquet file's row group may be as large as the file
    to_the_end = piece.stop == piece.slice.num_rows  # where the slice's count is checked
    samples = list(itertools.islice(rows, piece.first, None if to_the_end else piece.stop))
    return samples, None if anchors is None else anchors.read(piece.slice.shard, samples)


def _read_rounds(
    batch: dict[str, Any], *, plan_ref: ray.ObjectRef[RunPlan], world_size: int, first_step: int
) -> Iterator[pa.Table]:
    """Yield a table of one row per step and worker; see `_round_table`. A whole round is read before its first row."""
    count_storage_retries()
    plan: RunPlan = ray.get(plan_ref)
    rounds_per_epoch = plan.epoch(0).num_rounds
    for number in map(int, batch["id"]):
        epoch = plan.epoch(number // rounds_per_epoch)
        round_index = number % rounds_per_epoch
        with ThreadPoolExecutor(_PIECE_READERS) as pool:
            pieces = list(pool.map(partial(read_pairs, anchors=plan.anchors), epoch.pieces(round_index)))
        rows = [row for samples, _ in pieces for row in samples]
        vectors = [part for _, part in pieces if part is not None]
        anchors_RD = np.concatenate(vectors) if vectors else None
        start = epoch.epoch * epoch.num_steps + round_index * plan.steps_per_round
        for step, parts in enumerate(epoch.deal(round_index, world_size), start=start):
            if step < first_step:
                continue
            for part in parts:
                chosen = [rows[index] for index in part]
                yield _round_table(step, chosen, None if anchors_RD is None else anchors_RD[part])


def _round_table(step: int, rows: Sequence[Sample], anchors_BD: Anchors | None) -> pa.Table:
    """Return one row: step (of the whole run) and lists shard, key, image and caption, or anchor instead of caption."""
    lists: dict[str, Any] = {
        name: pa.array([[getattr(row, name) for row in rows]], kind) for name, kind in _ROUND_COLUMNS.items()
    }
    if anchors_BD is None:
        lists["caption"] = pa.array([[row.caption for row in rows]], pa.list_(pa.string()))
    else:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(anchors_BD.reshape(-1)), anchors_BD.shape[1])
        lists["anchor"] = pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), vectors)
    return pa.table({"step": pa.array([step], pa.int64()), **lists})


_ROUND_COLUMNS = {
    "shard": pa.list_(pa.string()),
    "key": pa.list_(pa.string()),
    "image": pa.list_(pa.large_binary()),
}


def _decode(table: pa.Table, *, preprocessing: Preprocessing, batch_rows: int) -> dict[str, Any]:
    """Turn a row into a batch of batch_rows places; those without a readable image are placeholders.

    Returns step, images uint8[1, batch_rows, 3, H, W], valid bool[1, batch_rows] and info (JSON: shard, key, rejects and,
    without anchors, texts). With anchors: anchors float32[1, batch_rows, D]. An unreadable image leaves zeros, `valid`
    False and a reject.
    """
    (row,) = table.select(["step", *_ROUND_COLUMNS]).to_pylist()
    size = preprocessing.size
    images = np.zeros((1, batch_rows, 3, size, size), np.uint8)
    valid = np.zeros((1, batch_rows), np.bool_)
    rejects = []
    for index, data in enumerate(row["image"]):
        try:
            images[0, index] = preprocess_image(data, preprocessing)
            valid[0, index] = True
        except ImageError as error:
            rejects.append(asdict(Reject(row["shard"][index], row["key"][index], error.reason, error.detail)))
    info: dict[str, Any] = {"rejects": rejects, "shard": row["shard"], "key": row["key"]}
    batch = {"step": np.array([row["step"]]), "images": images, "valid": valid}
    if "anchor" in table.column_names:
        batch["anchors"] = _padded(table.column("anchor"), batch_rows)
    else:
        (texts,) = table.column("caption").to_pylist()
        info["texts"] = texts + [""] * (batch_rows - len(texts))
    return {**batch, "info": np.array([json.dumps(info)])}


def _padded(column: pa.ChunkedArray, batch_rows: int) -> Anchors:
    """Return the vectors of a column of one list as float32[1, batch_rows, D], zeros after the last."""
    vectors = column.combine_chunks().flatten()
    padded = np.zeros((1, batch_rows, vectors.type.list_size), np.float32)
    padded[0, : len(vectors)] = vectors.flatten().to_numpy().reshape(len(vectors), -1)
    return padded


class PlannedBatches(DataConfig):  # type: ignore[misc]
    """Gives each training worker its part of every remaining step, whatever the number of workers.

    Ray Train asks at every start of a worker group, so after a failure the plan goes on from `next_step()`.
    """

    def __init__(self, plan: RunPlan, preprocessing: Preprocessing, next_step: Callable[[], int]) -> None:
        super().__init__()
        self.plan, self.preprocessing, self.next_step = plan, preprocessing, next_step

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_: object, **__: object
    ) -> list[dict[str, DataIterator]]:
        """Return one iterator per worker. Called by Ray Train; `datasets` only lends the name."""
        (name,) = datasets
        first_step = self.next_step()
        epoch = self.plan.epoch(0)
        first_round = first_step // epoch.num_steps * epoch.num_rounds
        first_round += first_step % epoch.num_steps // self.plan.steps_per_round
        rounds = range(first_round, max(first_round + 1, self.plan.epochs * epoch.num_rounds))
        dataset = ray.data.from_items([{"id": number} for number in rounds], override_num_blocks=len(rounds))
        dataset = dataset.map_batches(
            _read_rounds,
            batch_size=1,
            num_cpus=READER_CPUS,
            compute=TaskPoolStrategy(
                size=world_size
            ),  # one reader outruns any worker; more would only start more processes
            fn_kwargs={"plan_ref": ray.put(self.plan), "world_size": world_size, "first_step": first_step},
        ).map_batches(
            _decode,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=DECODER_CPUS,
            fn_kwargs={
                "preprocessing": self.preprocessing,
                "batch_rows": rows_per_worker(self.plan.global_batch_size, world_size),
            },
        )
        dataset.context.target_max_block_size = 1  # a block is one row: one worker's batch of one step
        dataset.context.execution_options.preserve_order = True
        pace(dataset)
        retry_network_errors(dataset)  # both operators give out the same rows when they run again
        dataset.set_name(name)
        return [{name: split} for split in dataset.streaming_split(world_size, equal=False)]


def worker_batches(iterator: DataIterator, first_step: int) -> Batches:
    """Yield a worker's batches in step order as (arrays, info); see `_decode` for both.

    Raises:
        RuntimeError: a batch arrived out of step, which would mix samples of different global batches.
    """
    for expected, batch in enumerate(iterator.iter_batches(batch_size=1, prefetch_batches=2), start=first_step):
        step = int(batch["step"][0])
        if step != expected:
            raise RuntimeError(f"the data pipeline delivered step {step} where step {expected} was due")
        arrays = {name: batch[name][0] for name in ("images", "valid", "anchors") if name in batch}
        yield arrays, json.loads(str(batch["info"][0]))


def started(source: Iterator[_T]) -> Iterator[_T]:
    """Return the items of `source`, asking for the first one now, in a thread."""
    with_first = ThreadPoolExecutor(1, thread_name_prefix="first-batch")
    first = with_first.submit(list, itertools.islice(source, 1))
    with_first.shutdown(wait=False)

    def items() -> Iterator[_T]:
        yield from first.result()
        yield from source

    return items()
