"""Shards to an embedding store, on Ray: what `embed.py` runs and `batch_retrieve.py` runs for a missing gallery.

A shard is the unit of work, retry and resume: one actor reads it as a stream, hands chunks of encoded images to
decoding tasks anywhere in the cluster, encodes what comes back and writes one part. Ray Data spreads the shards over the actors.
A rerun skips the parts that are finished; the manifest is written last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

import ray
import ray.data
from ray.data import ActorPoolStrategy

from cir_core import files
from cir_core.embedding_store import EmbeddingStore, EmbeddingWriter, StoreSpec, listing_digest
from cir_core.encoders import EncoderDetails
from cir_core.files import StoredFile
from cir_core.schema import CirError
from cir_core.shards import index_image_folder, list_images, list_shards, shard_versions
from jobs.decoding import Picture
from jobs.embedder import EmbedPlan, ShardEmbedder, Unit
from jobs.session import say
from jobs.storage import absolute

_FOLDER_ROWS = 4096  # images of a folder that make one part


def find_units(data: str) -> tuple[list[Unit], str]:
    """Return the units of work of shards or of an image folder, and a digest of the listing.

    Raises:
        CirError: there are neither shards nor images.
    """
    try:
        shards = list_shards(data)
    except CirError as no_shards:
        try:
            images = list_images(data)
        except CirError:
            raise no_shards from None
        index = index_image_folder(data, slice_rows=_FOLDER_ROWS)
        units = [Unit(number, part.shard, part) for number, part in enumerate(index.slices)]
        listing = [(absolute(item.uri), item.size_bytes, item.modified_ns) for item in images]
    else:
        units = [Unit(number, shard) for number, shard in enumerate(shards)]
        listing = [(absolute(shard), size, modified) for shard, size, modified in shard_versions(shards)]
    return units, listing_digest(listing)


def picture_units(pictures: Sequence[Picture], versions: Mapping[str, StoredFile]) -> tuple[list[Unit], str]:
    """Return the units of work of pictures, and a digest of them. versions: the file of each picture, by its key."""
    runs = [pictures[start : start + _FOLDER_ROWS] for start in range(0, len(pictures), _FOLDER_ROWS)]
    units = [
        Unit(number, f"pictures {run[0].key} to {run[-1].key}", None, tuple(run)) for number, run in enumerate(runs)
    ]
    listing = [
        (
            json.dumps([item.key, files.redact(absolute(item.uri)), str(item.crop), item.caption]),
            file.size_bytes,
            file.modified_ns,
        )
        for item in pictures
        for file in [versions[item.key]]
    ]
    return units, listing_digest(listing)


def store_spec(details: EncoderDetails, *, dtype: str, captions: str, input_digest: str) -> StoreSpec:
    """Return the identity of the store that this encoder makes of this input."""
    return StoreSpec(
        model=details.model,
        weights=details.pretrained or "own",
        weights_digest=details.weights_digest,
        adapter_digest=details.adapter_digest or "",
        config_digest=details.config_digest,
        tokenizer_digest=details.tokenizer_digest,
        preprocessing=details.preprocessing_tag,
        dim=details.dim,
        dtype=dtype,
        input_digest=f"{input_digest}:{captions}",
    )


def store_uri(storage_path: str, spec: StoreSpec) -> str:
    """Return where a store lies unless its user says otherwise: named by its identity."""
    return files.join(absolute(storage_path), "stores", spec.identity[:16])


def some_rejects(output: str, limit: int = 5) -> list[str]:
    """Name some of the rows that a store or a run rejected, with their reasons."""
    found: list[str] = []
    for item in files.list_files(files.join(output, "rejects")):
        with files.open_parquet(item.uri, "rejects") as file:
            for row in file.read().to_pylist():
                found.append(f"{row['shard']} {row['key']} ({row['reason']} {row['detail']})")
        if len(found) >= limit:
            break
    return found[:limit]


def embed_stores(plans: Sequence[EmbedPlan], *, num_encoders: int, max_rejects: int | None) -> list[EmbeddingStore]:
    """Make the stores, or reuse what is there: committed stores of the same identity, finished parts of others.

    Args:
        plans: what, with what, where; plans that share an encoder should be neighbours.
        num_encoders: actors, each with a copy of the model (and a GPU where plan.use_gpu).
        max_rejects: more unreadable images than this in a store are an error, and it is not committed; None = any number.

    Raises:
        CirError: too many rejects (the message names some), or a folder holds another store.
    """
    writers = [EmbeddingWriter(plan.output, plan.spec) for plan in plans]
    todo = []
    for number, (plan, writer) in enumerate(zip(plans, writers, strict=True)):
        done = writer.finished_parts()
        if not writer.committed:
            todo += [{"plan": number, "unit": unit.number} for unit in plan.units if unit.number not in done]
            if done:
                say(f"{plan.output}: {len(done)} of {len(plan.units)} parts are finished, going on with the rest")
    if todo:
        _run(plans, todo, min(num_encoders, len(todo)))
    return [_commit(plan, writer, max_rejects) for plan, writer in zip(plans, writers, strict=True)]


def _commit(plan: EmbedPlan, writer: EmbeddingWriter, max_rejects: int | None) -> EmbeddingStore:
    parts = writer.finished_parts()
    rejected = sum(part.num_rejects for part in parts.values())
    if max_rejects is not None and rejected > max_rejects:
        raise CirError(
            f"{rejected} images cannot be used, more than the {max_rejects} allowed; {plan.output} is not used. "
            f"Repair or remove them at the source: {'; '.join(some_rejects(plan.output))}"
        )
    rows_in = sum(part.num_rows + part.num_rejects for part in parts.values())  # each part was checked when written
    reused = ", reused" if writer.committed else ""
    if not writer.committed:
        writer.commit(rows_in=rows_in, parts=parts.values())
    say(f"embedding store {plan.output}: {rows_in - rejected} rows, {rejected} rejects{reused}")
    return EmbeddingStore.open(plan.output)


def _run(plans: Sequence[EmbedPlan], todo: list[dict[str, int]], num_encoders: int) -> None:
    dataset = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        ShardEmbedder,
        batch_size=1,
        compute=ActorPoolStrategy(size=num_encoders),
        num_cpus=0.5,
        num_gpus=1 if plans[0].use_gpu else None,
        fn_constructor_args=(list(plans),),
    )
    started, rows, rejects, last = time.perf_counter(), 0, 0, 0.0
    for finished, row in enumerate(dataset.iter_rows(), start=1):
        rows, rejects = rows + int(row["rows"]), rejects + int(row["rejects"])
        elapsed = time.perf_counter() - started
        if elapsed - last > 5 or finished == len(todo):
            last = elapsed
            eta = elapsed / finished * (len(todo) - finished)
            say(
                f"embedded {finished}/{len(todo)} shards ({100 * finished / len(todo):.0f} %)  {rows} rows  "
                f"{rows / elapsed:.0f} images/s  {rejects} rejects  ETA {eta:.0f} s"
            )
