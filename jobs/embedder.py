"""The actor that embeds shards, and what it is told.

A unit streams through it: rows are read (the next range of a remote shard on its way), chunks of them are decoded by
tasks anywhere in the cluster, encoded here, and appended to the unit's part. A chunk is bounded in rows and bytes and
few are under way, so memory depends neither on the size of a shard nor on their number. An actor works on two units at
once: one is read and written while the other is encoded.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import tenacity
import torch
from ray import cloudpickle

from cir_core import files
from cir_core.embedding_store import EmbeddingWriter, PartInfo, PartWriter, StoreSpec
from cir_core.encoders import load_encoder
from cir_core.schema import Reject, UnreadableError
from cir_core.shards import Sample, Slice, read_list_rows, read_shard, read_slice_rows
from jobs.decoding import Decoded, Picture, Row, decode_images, get_decoded
from jobs.encoding import EncoderCalls
from jobs.progress import Meter, StageMetrics
from jobs.reject_limit import RejectLimit
from jobs.session import node_cpus

UNITS_AT_ONCE = 2  # per encoder: the ends of one unit overlap with the middle of another
_IN_FLIGHT = 3  # chunks being decoded per unit: enough to hide a decode behind an encode
_CHUNK_BYTES = 64 << 20  # encoded images of a chunk, so that a shard of huge files does not fill the object store


@dataclass(frozen=True)
class Unit:
    """One unit of work: a shard, a run of a folder's files or of a list's rows, or pictures. number: names its part.

    rejects: rows that the listing alone showed to be of no use.
    """

    number: int
    shard: str
    files: Slice | None = None
    pictures: tuple[Picture, ...] = ()
    rejects: tuple[Reject, ...] = ()

    @property
    def num_rows(self) -> int | None:
        """Rows, good and bad, that the listing shows; None for a whole shard, which only its reader can count."""
        if self.files is None and not self.pictures and not self.rejects:
            return None
        return len(self.rejects) + len(self.pictures) + (self.files.num_rows if self.files else 0)

    def packed(self) -> bytes:
        """Return the unit as Ray passes objects from one process of a job to another: a value for a column."""
        data: bytes = cloudpickle.dumps(self)
        return data

    @staticmethod
    def unpacked(data: bytes) -> Unit:
        """Return what `packed` was called on."""
        unit: Unit = cloudpickle.loads(data)
        return unit


@dataclass(frozen=True, kw_only=True)
class EmbedPlan:
    """What to embed with what, and where to; at which precision, spec says.

    captions: "no", "text" (kept as text) or "embed" (kept and embedded).
    ids: "key", or "shard" for <name of the shard>/<key>, where keys repeat from shard to shard.
    """

    units: tuple[Unit, ...]
    output: str
    spec: StoreSpec
    model: str
    pretrained: str | None
    adapter: str | None
    preprocessing_mode: str | None
    captions: str
    batch_size: int
    use_gpu: bool
    ids: str = "key"
    decode: str = "exact"
    unreadable_shards: str = "stop"
    encoder_threads: int = 0

    @property
    def encoder(self) -> tuple[str, str | None, str | None, str, str | None, str]:
        """What decides the model: plans with equal values share one in memory."""
        return self.model, self.pretrained, self.adapter, self.spec.precision, self.preprocessing_mode, self.decode


@dataclass(frozen=True)
class _Session:
    """What a unit of one plan needs."""

    plan: EmbedPlan
    encoder: Any
    writer: EmbeddingWriter
    limit: RejectLimit

    def rows(self, unit: Unit) -> Iterator[Row | Reject]:
        """Read a unit: usable rows, and rejects."""
        yield from unit.rejects
        if unit.pictures:
            yield from unit.pictures
        elif unit.files is not None:
            cut = unit.files.links  # with all rows of a list, where a folder's listing has shown the bad ones
            yield from read_list_rows(unit.files) if cut else read_slice_rows(unit.files, require_caption=False)
        elif not unit.rejects:
            try:
                yield from read_shard(unit.shard, require_caption=False)
            except UnreadableError as error:  # a file that is gone, refused or changed is a matter for a person
                if self.plan.unreadable_shards == "stop":
                    raise
                yield Reject(files.redact(unit.shard), "", "unreadable_shard", str(error))

    def row_id(self, row: Row) -> str:
        """Return the id of a row in the store."""
        if self.plan.ids == "shard" and isinstance(row, Sample):
            return f"{shard_name(row.shard)}/{row.key}"
        return row.key


class _Counted:
    """The rows of a unit, in chunks. rows_read: every row that was asked for, good and bad."""

    def __init__(self, rows: Iterator[Row | Reject]) -> None:
        self._rows, self.rows_read = rows, 0

    def next_chunk(self, max_rows: int) -> tuple[list[Row], list[Reject]]:
        """Take rows for one decoding task, and the rejects on the way; both empty at the end. Bounded in rows and bytes."""
        rows: list[Row] = []
        rejects: list[Reject] = []
        held = 0
        while len(rows) < max_rows and held < _CHUNK_BYTES and len(rejects) < max_rows:
            row = next(self._rows, None)
            if row is None:
                break
            self.rows_read += 1
            if isinstance(row, Reject):
                rejects.append(row)
            else:
                rows.append(row)
                held += len(row.image) if isinstance(row, Sample) else 0
        return rows, rejects


def shard_name(uri: str) -> str:
    """Return the name of a shard without folder and suffix."""
    return uri.rpartition("/")[2].rpartition(".")[0]


class ShardEmbedder:
    """An actor that turns units of one or several plans into parts; it loads one model at a time."""

    def __init__(
        self,
        plans: list[EmbedPlan],
        board: ray.actor.ActorHandle | None,
        limits: Sequence[RejectLimit],
    ) -> None:
        self.plans, self.board, self.limits = plans, board, limits
        self.metrics = StageMetrics("embed", "rows", "rejects", "megabytes")
        self._setting_up = threading.Lock()
        self._sessions: dict[int, _Session] = {}
        self._encoded = EncoderCalls(use_gpu=plans[0].use_gpu, threads=plans[0].encoder_threads or node_cpus())

    def _session(self, number: int) -> _Session:
        with self._setting_up:
            if number not in self._sessions:
                plan = self.plans[number]
                others = [one for one in self._sessions.values() if one.plan.encoder == plan.encoder]
                encoder = others[0].encoder if others else self._load(plan)
                self._sessions = {key: one for key, one in self._sessions.items() if one in others}
                writer = EmbeddingWriter(plan.output, plan.spec)
                self._sessions[number] = _Session(plan, encoder, writer, self.limits[number])
            return self._sessions[number]

    @staticmethod
    def _load(plan: EmbedPlan) -> Any:
        model, pretrained, adapter, precision, mode, decode = plan.encoder
        device = "cuda" if plan.use_gpu else "cpu"
        encoder = load_encoder(model, pretrained, adapter, device, precision, preprocessing_mode=mode, decode=decode)
        from cir_core.lora import last_block_for_class_token  # imports open_clip, which a driver has no use for

        last_block_for_class_token(encoder.model.visual)
        return encoder

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Embed the units in `batch`; one row for each: its plan and its PartInfo, as JSON."""
        for number, shipped in zip(batch["plan"], batch["unit"], strict=True):
            session, unit = self._session(int(number)), Unit.unpacked(shipped)
            info = session.writer.finished_part(unit.number)  # by an attempt that died before it could say so
            if info is None:
                info = self.embed(session, unit)
            told = {"plan": int(number), "part": asdict(info)}
            yield {"told": np.array([json.dumps(told)])}

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(OSError),
        wait=tenacity.wait_random_exponential(multiplier=1, max=30),
        stop=tenacity.stop_after_attempt(3),
        reraise=True,
    )
    def embed(self, session: _Session, unit: Unit) -> PartInfo:
        """Read, decode, encode and write one unit; a network failure that outlasts all patience repeats it.

        Raises:
            CirError: the unit brings the store above its limit of rejects; the rest of it is not read.
        """
        plan = session.plan
        meter = Meter(self.board, self.metrics, key=f"{plan.output} {unit.number}")
        with session.writer.part(
            unit.number,
            columns=[] if plan.captions == "no" else ["caption"],
            caption_embeddings=plan.captions == "embed",
        ) as part:
            source = _Counted(session.rows(unit))
            for rows, decoded in self._decoded(session, source, part, meter):
                part.reject(decoded.rejects)
                kept = list(itertools.compress(rows, decoded.readable))
                if kept:
                    self._append(session, part, kept, decoded.images, meter)
                meter.count(rows=len(kept), rejects=len(decoded.rejects), megabytes=decoded.num_bytes / 1e6)
                meter.busy("decode", decoded.seconds)
            if source.rows_read != part.num_rows + len(part.rejects):
                raise RuntimeError(
                    f"{unit.shard}: read {source.rows_read} rows, kept {part.num_rows}, rejected {len(part.rejects)}"
                )
            closing = time.perf_counter()
        meter.took("write", time.perf_counter() - closing)
        meter.tell()
        if part.info is None:
            raise RuntimeError(f"{part.name} is not finished")
        return part.info

    def _append(
        self, session: _Session, part: PartWriter, rows: list[Row], images: np.ndarray[Any, Any], meter: Meter
    ) -> None:
        captions = [row.caption for row in rows]
        with meter.stage("encode"):
            embeddings = self._encoded(session.encoder.encode_images, torch.from_numpy(images.copy()))
            texts = self._encoded(session.encoder.encode_texts, captions) if session.plan.captions == "embed" else None
        with meter.stage("write"):
            columns = {} if session.plan.captions == "no" else {"caption": captions}
            part.add([session.row_id(row) for row in rows], embeddings, columns=columns, caption_embeddings=texts)

    def _decoded(
        self, session: _Session, source: _Counted, part: PartWriter, meter: Meter
    ) -> Iterator[tuple[list[Row], Decoded]]:
        """Yield chunks of rows and what their images decode to, in order; rows that are no images go to `part`."""
        waiting: deque[tuple[list[Row], Any]] = deque()
        preprocessing = session.encoder.preprocessing
        while True:
            with meter.stage("read"):
                chunk, rejects = source.next_chunk(session.plan.batch_size)
            part.reject(rejects)
            meter.count(rejects=len(rejects))
            session.limit.check_part(part.num_rows, part.rejects, lambda: meter.totals(f"{session.plan.output} "))
            if chunk:
                waiting.append((chunk, decode_images.remote(chunk, preprocessing)))
            if waiting and (len(waiting) >= _IN_FLIGHT or not chunk):
                rows, ref = waiting.popleft()
                with meter.stage("decode"):
                    decoded = get_decoded(rows, ref, preprocessing)
                yield rows, decoded
            elif not chunk and not rejects:
                return
