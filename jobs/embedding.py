"""Shards to an embedding store, on Ray: what `embed.py` runs and `batch_retrieve.py` runs for a missing gallery.

A shard is the unit of work, retry and resume: one actor reads it as a stream, hands chunks of encoded images to
decoding tasks anywhere in the cluster, encodes what comes back and writes one part. Ray Data spreads the shards over the actors.
A rerun skips the parts that are finished; the manifest is written last.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import tenacity
import torch
from ray.data import ActorPoolStrategy

from cir_core import files
from cir_core.embedding_store import EmbeddingStore, EmbeddingWriter, PartInfo, StoreSpec, listing_digest
from cir_core.encoders import OpenClipEncoder, load_encoder
from cir_core.preprocessing import ImageError, Preprocessing, preprocess_image
from cir_core.schema import CirError, Reject
from cir_core.shards import (
    Sample,
    Slice,
    index_image_folder,
    list_images,
    list_shards,
    read_shard,
    read_slice,
    shard_sizes,
)
from jobs.session import say

DECODER_CPUS = 1.0  # decoding takes a core; fewer workers also means fewer imports
_IN_FLIGHT = 4  # chunks being decoded per encoder: enough to hide a decode behind an encode, small enough for memory
_FOLDER_ROWS = 4096  # images of a folder that make one part


@dataclass(frozen=True)
class Unit:
    """One unit of work: a shard, or a run of an image folder's files. number: names its part."""

    number: int
    shard: str
    files: Slice | None = None


@dataclass(frozen=True, kw_only=True)
class EmbedPlan:
    """What to embed with what, and where to. captions: "no", "text" (kept as text) or "embed" (kept and embedded)."""

    units: tuple[Unit, ...]
    output: str
    spec: StoreSpec
    model: str
    pretrained: str | None
    adapter: str | None
    precision: str
    preprocessing_mode: str | None
    captions: str
    batch_size: int
    use_gpu: bool

    @property
    def encoder(self) -> tuple[str, str | None, str | None, str, str | None]:
        """What decides the model: plans with equal values share one in memory."""
        return self.model, self.pretrained, self.adapter, self.precision, self.preprocessing_mode


def find_units(data: str) -> tuple[list[Unit], str]:
    """Return the units of work of shards or of an image folder, and a digest of the listing (names and sizes).

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
        listing = [(item.name, item.size_bytes) for item in images]
    else:
        units = [Unit(number, shard) for number, shard in enumerate(shards)]
        listing = [(shard.rsplit("/", 1)[-1], size) for shard, size in shard_sizes(shards)]
    return units, listing_digest(listing)


def store_spec(encoder: OpenClipEncoder, *, dtype: str, captions: str, input_digest: str) -> StoreSpec:
    """Return the identity of the store that this encoder makes of this input."""
    details = encoder.details
    return StoreSpec(
        model=details.model,
        weights=details.pretrained or "own",
        weights_digest=details.weights_digest,
        adapter_digest=details.adapter_digest or "",
        preprocessing=details.preprocessing_tag,
        dim=details.dim,
        dtype=dtype,
        input_digest=f"{input_digest}:{captions}",
    )


@ray.remote(num_cpus=DECODER_CPUS, max_retries=5)
def _decode(rows: list[Sample], preprocessing: Preprocessing) -> tuple[np.ndarray[Any, Any], list[bool], list[Reject]]:
    """Return uint8[n, 3, H, W] of the readable images, which rows they are, and why the others are not."""
    images, readable, rejects = [], [], []
    for row in rows:
        try:
            images.append(preprocess_image(row.image, preprocessing))
            readable.append(True)
        except ImageError as error:
            readable.append(False)
            rejects.append(Reject(row.shard, row.key, error.reason, error.detail))
    size = preprocessing.size
    stacked = np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
    return stacked, readable, rejects


class ShardEmbedder:
    """An actor that turns units of one or several plans into parts; it holds one model at a time."""

    def __init__(self, plans: list[EmbedPlan]) -> None:
        self.plans, self.plan = plans, plans[0]
        self.number = -1  # of the plan that is set up
        self.rows_read = 0  # of the unit under way

    def _set_up(self, number: int) -> None:
        if number == self.number:
            return
        plan = self.plans[number]
        if self.number < 0 or plan.encoder != self.plan.encoder:
            model, pretrained, adapter, precision, mode = plan.encoder
            device = "cuda" if plan.use_gpu else "cpu"
            self.encoder = load_encoder(model, pretrained, adapter, device, precision, preprocessing_mode=mode)
        self.number, self.plan, self.writer = number, plan, EmbeddingWriter(plan.output, plan.spec)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Embed the units in `batch`: numbers of their plans and of the units in them; one row of counts each."""
        for plan, unit in zip(batch["plan"], batch["unit"], strict=True):
            self._set_up(int(plan))
            info = self.embed(self.plan.units[int(unit)])
            yield {"rows": np.array([info.num_rows]), "rejects": np.array([info.num_rejects])}

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(OSError),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
        stop=tenacity.stop_after_attempt(6),
        reraise=True,
    )
    def embed(self, unit: Unit) -> PartInfo:
        """Read, decode, encode and write one unit; a network failure anywhere repeats the whole unit."""
        ids: list[str] = []
        captions: list[str] = []
        embeddings: list[torch.Tensor] = []
        rejects: list[Reject] = []
        for rows, images, found in self._decoded(unit, rejects):
            rejects += found
            ids += [row.key for row in rows]
            captions += [row.caption for row in rows]
            if rows:
                embeddings.append(self.encoder.encode_images(torch.from_numpy(images.copy())).cpu())
        if self.rows_read != len(ids) + len(rejects):
            raise RuntimeError(f"{unit.shard}: read {self.rows_read} rows, kept {len(ids)}, rejected {len(rejects)}")
        keep_text = self.plan.captions != "no"
        texts = self.encoder.encode_texts(captions).cpu().numpy() if self.plan.captions == "embed" else None
        stacked = torch.cat(embeddings).numpy() if embeddings else np.zeros((0, self.encoder.dim), np.float32)
        return self.writer.write_part(
            unit.number,
            ids,
            stacked,
            columns={"caption": captions} if keep_text else {},
            caption_embeddings=texts,
            rejects=rejects,
        )

    def _decoded(
        self, unit: Unit, rejects: list[Reject]
    ) -> Iterator[tuple[list[Sample], np.ndarray[Any, Any], list[Reject]]]:
        """Yield (readable rows, images, rejects) in order, with a bounded number of chunks being decoded."""
        waiting: deque[tuple[list[Sample], Any]] = deque()
        source: Iterator[Sample | Reject]
        if unit.files is not None:
            source = read_slice(unit.files, require_caption=False)
        else:
            source = read_shard(unit.shard, require_caption=False)
        samples = self._counted(source, rejects)
        while True:
            chunk = list(itertools.islice(samples, self.plan.batch_size))
            if chunk:
                waiting.append((chunk, _decode.remote(chunk, self.encoder.preprocessing)))
            if waiting and (len(waiting) >= _IN_FLIGHT or not chunk):
                rows, ref = waiting.popleft()
                images, readable, found = ray.get(ref)
                yield list(itertools.compress(rows, readable)), images, found
            elif not chunk:
                return

    def _counted(self, source: Iterator[Sample | Reject], rejects: list[Reject]) -> Iterator[Sample]:
        self.rows_read = 0
        for row in source:
            self.rows_read += 1
            if isinstance(row, Reject):
                rejects.append(row)
            else:
                yield row


def _some_rejects(output: str, limit: int = 5) -> list[str]:
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
            f"Repair or remove them at the source: {'; '.join(_some_rejects(plan.output))}"
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
