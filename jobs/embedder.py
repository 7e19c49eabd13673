"""The actor that embeds shards, and what it is told."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import tenacity
import torch

from cir_core.embedding_store import EmbeddingWriter, PartInfo, StoreSpec
from cir_core.encoders import load_encoder
from cir_core.schema import Reject
from cir_core.shards import Sample, Slice, read_shard, read_slice
from jobs.decoding import Picture, decode_images

_IN_FLIGHT = 4  # chunks being decoded per encoder: enough to hide a decode behind an encode, small enough for memory


@dataclass(frozen=True)
class Unit:
    """One unit of work: a shard, a run of an image folder's files, or pictures. number: names its part."""

    number: int
    shard: str
    files: Slice | None = None
    pictures: tuple[Picture, ...] = ()


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
    ) -> Iterator[tuple[list[Sample | Picture], np.ndarray[Any, Any], list[Reject]]]:
        """Yield (readable rows, images, rejects) in order, with a bounded number of chunks being decoded."""
        waiting: deque[tuple[list[Sample | Picture], Any]] = deque()
        source: Iterator[Sample | Picture | Reject]
        if unit.pictures:
            source = iter(unit.pictures)
        elif unit.files is not None:
            source = read_slice(unit.files, require_caption=False)
        else:
            source = read_shard(unit.shard, require_caption=False)
        samples = self._counted(source, rejects)
        while True:
            chunk = list(itertools.islice(samples, self.plan.batch_size))
            if chunk:
                waiting.append((chunk, decode_images.remote(chunk, self.encoder.preprocessing)))
            if waiting and (len(waiting) >= _IN_FLIGHT or not chunk):
                rows, ref = waiting.popleft()
                images, readable, found = ray.get(ref)
                yield list(itertools.compress(rows, readable)), images, found
            elif not chunk:
                return

    def _counted(
        self, source: Iterator[Sample | Picture | Reject], rejects: list[Reject]
    ) -> Iterator[Sample | Picture]:
        self.rows_read = 0
        for row in source:
            self.rows_read += 1
            if isinstance(row, Reject):
                rejects.append(row)
            else:
                yield row
