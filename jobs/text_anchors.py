"""Text anchors, made once: every caption of the shards through the frozen text tower, kept in an embedding store.

    <storage_path>/anchors/<identity>/    part N: the samples of shard N in the order of `Sample.row`;
                                          id = key, embedding = the anchor, caption = the text it was made of

A training run reads its anchors with the images, so the text tower does not run in training. The store is named by
everything that made it (weights, tokenizer, precision, listing of the shards), so another run with the same text tower
and shards uses it again, and a run that was killed embeds only what is missing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray.data
from ray.data import ActorPoolStrategy

from cir_core import files
from cir_core.embedding_store import EmbeddingStore, EmbeddingWriter, StoreSpec, listing_digest
from cir_core.encoders import EncoderDetails, load_encoder
from cir_core.schema import CirError
from cir_core.shards import Sample, ShardIndex, read_captions, shard_versions
from jobs.session import node_cpus, retry_network_errors, say
from jobs.storage import RunFolder, absolute

if TYPE_CHECKING:
    from jobs.models import ModelInfo
    from jobs.tat_train import TatTrainConfig

_ROW_GROUP_ROWS = 256  # a slice of a shard has as many rows: its anchors are one or two row groups
_BATCH_ROWS = 256


@dataclass(frozen=True)
class TextAnchors:
    """A committed store of anchors as the readers of a training run see it. parts: shard URI -> part."""

    store: EmbeddingStore
    parts: Mapping[str, int]

    @property
    def dim(self) -> int:
        """D, the length of an anchor."""
        return self.store.manifest.spec.dim

    def read(self, shard: str, samples: Sequence[Sample]) -> npt.NDArray[np.float32]:
        """Return the anchors float32[n, D] of n consecutive samples of a shard, n >= 1.

        Raises:
            CirError: the anchors there were made of other keys or captions: the shard was changed since.
        """
        first = samples[0].row
        block = self.store.read_rows(self.parts[shard], first, first + len(samples), columns=("caption",))
        made_of = list(zip(block.ids, block.columns["caption"], strict=True))
        if made_of != [(sample.key, sample.caption) for sample in samples]:
            raise CirError(
                f"{files.redact(shard)}: the text anchors of rows {first} to {first + len(samples) - 1} in "
                f"{files.redact(self.store.uri)} were made of other captions, the shard was changed since; put the shard "
                "back, or start a run of another --name: it makes anchors of the shards as they are"
            )
        return np.asarray(block.embeddings, np.float32)


def anchor_spec(details: EncoderDetails, precision: str, shards: Sequence[str]) -> StoreSpec:
    """Return the identity of the anchors of these shards as they are now. precision: "fp32" or "bf16"."""
    versions = [(absolute(shard), size, modified) for shard, size, modified in shard_versions(shards)]
    return StoreSpec(
        model=details.model,
        weights=details.pretrained or "own",
        weights_digest=details.weights_digest,
        adapter_digest="",
        config_digest=details.config_digest,
        tokenizer_digest=details.tokenizer_digest,
        preprocessing="captions",
        dim=details.dim,
        dtype="float32",
        input_digest=f"{listing_digest(versions)}:anchors",
        precision=precision,
    )


@dataclass(frozen=True, kw_only=True)
class AnchorPlan:
    """What to embed with what, and where to. spec: as in `anchor_spec`."""

    indexes: tuple[ShardIndex, ...]
    uri: str
    spec: StoreSpec
    model: str
    pretrained: str | None
    use_gpu: bool

    def writer(self) -> EmbeddingWriter:
        """Open the store for writing; see EmbeddingWriter."""
        return EmbeddingWriter(self.uri, self.spec, row_group_rows=_ROW_GROUP_ROWS)


class CaptionEmbedder:
    """An actor that turns the captions of shards into parts, batch by batch; it never holds an image."""

    def __init__(self, plan: AnchorPlan, num_actors: int) -> None:
        from jobs.encoding import EncoderCalls  # imports torch, which a driver has no use for

        self._encoded = EncoderCalls(use_gpu=plan.use_gpu, threads=max(1, node_cpus() // num_actors))
        self.plan, self.writer = plan, plan.writer()
        device = "cuda" if plan.use_gpu else "cpu"
        self.encoder = load_encoder(plan.model, plan.pretrained, device=device, precision=plan.spec.precision)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Embed the shards whose numbers are in `batch`; one row of counts each."""
        for number in map(int, batch["shard"]):
            yield {"rows": np.array([self.embed(number)])}

    def embed(self, number: int) -> int:
        """Embed one shard, write its part, and return its rows.

        Raises:
            CirError: the shard does not hold the samples that were counted.
        """
        index = self.plan.indexes[number]
        pairs = read_captions(index.shard)
        with self.writer.part(number, columns=["caption"]) as part:
            while batch := list(itertools.islice(pairs, _BATCH_ROWS)):
                captions = [caption for _, caption in batch]
                anchors = self._encoded(self.encoder.encode_texts, captions)
                part.add([key for key, _ in batch], anchors, columns={"caption": captions})
            if part.num_rows != index.num_samples:
                raise CirError(
                    f"{files.redact(index.shard)} holds {part.num_rows} samples where {index.num_samples} were counted: the "
                    "shard was changed meanwhile; run the job again"
                )
        return part.num_rows


def make_anchors(
    indexes: Sequence[ShardIndex],
    model: ModelInfo,
    spec: StoreSpec,
    *,
    storage_uri: str,
    num_actors: tuple[int, int],
    cpus_per_actor: float,
    use_gpu: bool,
) -> TextAnchors:
    """Embed what is missing of the captions of all shards, commit the store, and open it.

    Args:
        indexes: the counted shards. model: what embeds. spec: what `anchor_spec` said of them.
        storage_uri: the store's folder is made below it.
        num_actors: (fewest, most) processes with a copy of the model each; on a GPU each where use_gpu.

    Raises:
        CirError: a shard was changed since it was listed or counted.
    """
    uri = files.join(storage_uri, "anchors", spec.identity[:16])
    plan = AnchorPlan(
        indexes=tuple(indexes), uri=uri, spec=spec, model=model.model, pretrained=model.pretrained,
        use_gpu=use_gpu,
    )  # fmt: skip
    writer = plan.writer()
    reused = writer.committed
    if not reused:
        done = writer.finished_parts()
        missing = [number for number in range(len(indexes)) if number not in done]
        if missing:
            _embed(plan, missing, num_actors, cpus_per_actor)
        if anchor_spec(model.details, spec.precision, [index.shard for index in indexes]) != spec:
            raise CirError("the shards were changed while their captions were embedded; run the job again")
        # Keys are unique in a shard; two shards may hold the same ones.
        writer.commit(rows_in=sum(index.num_samples for index in indexes), check_unique_ids=False)
    store = EmbeddingStore.open(uri)
    if [part.num_rows for part in store.parts] != [index.num_samples for index in indexes]:
        raise CirError(f"{files.redact(uri)}: its parts are not those of these shards; remove it and run the job again")
    say(f"text anchors {uri}: {store.num_rows} captions{', reused' if reused else ''}")
    return TextAnchors(store, {index.shard: number for number, index in enumerate(indexes)})


def _embed(plan: AnchorPlan, missing: Sequence[int], num_actors: tuple[int, int], cpus_per_actor: float) -> None:
    """Have actors embed the missing shards, and say how far they are."""
    finished = len(plan.indexes) - len(missing)
    if finished:
        say(f"text anchors {plan.uri}: {finished} of {len(plan.indexes)} parts are finished, going on with the rest")
    fewest, most = (min(number, len(missing)) for number in num_actors)
    dataset = ray.data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing))
    dataset = dataset.map_batches(
        CaptionEmbedder,
        batch_size=1,
        compute=ActorPoolStrategy(min_size=fewest, max_size=most),
        num_cpus=cpus_per_actor,
        num_gpus=1 if plan.use_gpu else None,
        fn_constructor_args=(plan, most),
    )
    retry_network_errors(dataset)
    started, rows, last = time.perf_counter(), 0, 0.0
    for done, row in enumerate(dataset.iter_rows(), start=1):
        rows += int(row["rows"])
        elapsed = time.perf_counter() - started
        if elapsed - last > 5 or done == len(missing):
            last = elapsed
            say(
                f"captions of {finished + done}/{len(plan.indexes)} shards embedded  {rows} rows  "
                f"{rows / elapsed:.0f} captions/s  ETA {elapsed / done * (len(missing) - done):.0f} s"
            )


def run_anchors(
    config: TatTrainConfig, folder: RunFolder, model: ModelInfo, indexes: Sequence[ShardIndex]
) -> TextAnchors | None:
    """Make or find the anchors of a run that wants them. A resumed run gets those that it began with.

    Raises:
        CirError: those would be others now: the tokenizer or the model's configuration was changed.
    """
    if not config.cache_text_anchors:
        return None
    recorded = folder.path("anchors.json")
    before = files.read_json(recorded) if files.exists(recorded) else {}
    precision = before.get("precision", config.resolved_precision)  # also if it goes on with use_gpu changed
    spec = anchor_spec(model.details, precision, [index.shard for index in indexes])
    if before.get("identity", spec.identity) != spec.identity:
        raise CirError(
            f"run {folder.name} began with other text anchors: since then the model's configuration or tokenizer, or the "
            "shards, were changed; put them back, or choose another --name"
        )
    files.write_json(recorded, {"identity": spec.identity, "precision": precision})
    workers = config.num_workers if isinstance(config.num_workers, tuple) else (config.num_workers, config.num_workers)
    return make_anchors(
        indexes,
        model,
        spec,
        storage_uri=absolute(config.storage_path),
        num_actors=workers,
        cpus_per_actor=config.cpus_per_worker,
        use_gpu=config.use_gpu,
    )
