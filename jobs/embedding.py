"""Shards to an embedding store, on Ray: what `embed.py` runs and `batch_retrieve.py` runs for a missing gallery.

A shard is the unit of work, retry and resume: one actor reads it as a stream, hands chunks of encoded images to
decoding tasks anywhere in the cluster, encodes what comes back and writes one part. Ray Data spreads the shards over the actors.
A rerun skips the parts that are finished; the manifest is written last.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy

from cir_core import files
from cir_core.embedding_store import (
    EmbeddingStore,
    EmbeddingWriter,
    PartInfo,
    StoreSpec,
    listing_digest,
    part_info,
)
from cir_core.encoders import EncoderDetails
from cir_core.files import StoredFile
from cir_core.schema import CirError, UnreadableError
from cir_core.shards import (
    Slice,
    cut_uri_list,
    index_image_folder,
    is_uri_list,
    list_images,
    list_shards,
    shard_versions,
)
from jobs.decoding import ENCODER_CPUS, Picture
from jobs.embedder import UNITS_AT_ONCE, EmbedPlan, ShardEmbedder, Unit, shard_name
from jobs.embedding_progress import EmbeddingProgress
from jobs.progress import Reporter
from jobs.reject_limit import RejectLimit
from jobs.session import say
from jobs.storage import absolute
from jobs.tracking import Tracker
from jobs.unique_ids import drop_duplicates

MAX_BLOCKS = 2000  # Ray Data keeps books for each
_FOLDER_ROWS = 4096  # images of a folder, or rows of a list, that make one part
_MANY_FILES = 5_000_000  # images of a folder, above which a list is the better input


def find_units(data: str, *, captions: bool = True) -> tuple[list[Unit], str]:
    """Return the units of work of shards, of lists of image URIs or of an image folder, and a digest of the listing.

    captions: whether the `.txt` files of a folder are wanted.

    Raises:
        CirError: there is none of these, or it cannot be read.
    """
    try:
        shards = list_shards(data)
    except CirError as error:
        if not files.is_folder(data):
            raise
        no_shards = error.with_traceback(None)  # which holds the listing
    else:
        return _shard_units(shards)
    try:
        return _folder_units(data, captions=captions)
    except CirError:
        raise no_shards from None


def _shard_units(shards: Sequence[str]) -> tuple[list[Unit], str]:
    units: list[Unit] = []
    kinds = {"tar": False, "csv": True, "parquet": _are_lists(shards)}
    for shard in shards:
        cut = _cut(shard) if kinds[files.redact(shard).rpartition(".")[2]] else None
        if cut is None:
            units.append(Unit(len(units), shard))
        else:
            units += [Unit(number, part.shard, part) for number, part in enumerate(cut, start=len(units))]
    listing = [(absolute(shard), size, modified) for shard, size, modified in shard_versions(shards)]
    return units, listing_digest(listing)


def _are_lists(shards: Sequence[str]) -> bool:
    """Whether the Parquet files among the shards are lists of URIs: all are as the first one that can be opened."""
    for shard in shards:
        if files.redact(shard).endswith(".parquet"):
            with suppress(UnreadableError):  # told by the actor that reads it, see --unreadable_shards
                return is_uri_list(shard)
    return False


def _cut(shard: str) -> list[Slice] | None:
    """Cut a list; None for a file that is none at all, which is left to the actor that reads it."""
    try:
        return cut_uri_list(shard, _FOLDER_ROWS)
    except UnreadableError:
        return None


def _folder_units(data: str, *, captions: bool) -> tuple[list[Unit], str]:
    listed = files.list_files(data)
    index = index_image_folder(data, slice_rows=_FOLDER_ROWS, captions=captions, listed=listed)
    units = [Unit(number, part.shard, part) for number, part in enumerate(index.slices)]
    if index.rejects:
        units.append(Unit(len(units), files.redact(data), rejects=index.rejects))
    if index.num_samples > _MANY_FILES:
        say(
            f"{files.redact(data)} holds {index.num_samples} images; a driver holds the names of all, some 400 bytes each. "
            "A Parquet list of their URIs is read row by row instead"
        )
    wanted = list_images(data, listed=listed) if not captions else listed
    return units, listing_digest((absolute(item.uri), item.size_bytes, item.modified_ns) for item in wanted)


def check_shard_names(units: Sequence[Unit]) -> None:
    """Raise CirError if ids made of shard names could not tell shards apart."""
    shards = {unit.shard for unit in units}
    names = Counter(map(shard_name, shards))
    if len(names) < len(shards):
        name, count = names.most_common(1)[0]
        raise CirError(f"--ids shard: {count} shards are named {name!r}, in different folders; embed them one by one")


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


def store_spec(details: EncoderDetails, *, dtype: str, captions: str, input_digest: str, ids: str = "key") -> StoreSpec:
    """Return the identity of the store that this encoder makes of this input; details.precision is the encoders'."""
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
        input_digest=f"{input_digest}:{captions}" + ("" if ids == "key" else f":{ids}"),
        precision=details.precision,
    )


def store_uri(storage_path: str, spec: StoreSpec) -> str:
    """Return where a store lies unless its user says otherwise: named by its identity."""
    return files.join(absolute(storage_path), "stores", spec.identity[:16])


def embed_stores(
    plans: Sequence[EmbedPlan],
    *,
    num_encoders: int,
    max_rejects: int | None,
    max_reject_share: float = 1.0,
    tracker: Tracker | None = None,
) -> list[EmbeddingStore]:
    """Make the stores, or reuse what is there: committed stores of the same identity, finished parts of others.

    Args:
        plans: what, with what, where; plans that share an encoder should be neighbours.
        num_encoders: actors, each with a copy of the model (and a GPU where plan.use_gpu).
        max_rejects: more unusable rows than this in a store stop the run, and it is not committed; None = any number.
        max_reject_share: a larger share of unusable rows does so as well.
        tracker: gets progress while the run lasts.

    Raises:
        CirError: too many rejects (the message names some), or a folder holds another store.
    """
    writers = [EmbeddingWriter(plan.output, plan.spec) for plan in plans]
    limits = [RejectLimit(plan.output, max_rejects, max_reject_share) for plan in plans]
    todo = []
    for number, (plan, writer) in enumerate(zip(plans, writers, strict=True)):
        if writer.committed:
            limits[number].judge(EmbeddingStore.open(plan.output).parts)
            continue
        done = writer.finished_parts()
        _check_rows(plan, done)
        for part in done.values():
            limits[number].count(part)
        limits[number].check()
        todo += [{"plan": number, "unit": unit.packed()} for unit in plan.units if unit.number not in done]
        if done:
            say(f"{plan.output}: {len(done)} of {len(plan.units)} parts are finished, going on with the rest")
    if todo:
        _run(plans, todo, min(num_encoders, len(todo)), limits, tracker)
    return [_commit(plan, writer, limit) for plan, writer, limit in zip(plans, writers, limits, strict=True)]


def _commit(plan: EmbedPlan, writer: EmbeddingWriter, limit: RejectLimit) -> EmbeddingStore:
    if writer.committed:
        store = EmbeddingStore.open(plan.output)
        say(f"embedding store {plan.output}: {store.num_rows} rows, {store.manifest.num_rejects} rejects, reused")
        return store
    before = writer.finished_parts()
    if len(before) != len(plan.units):
        raise RuntimeError(f"{len(plan.units) - len(before)} of {len(plan.units)} parts of {plan.output} are missing")
    _check_rows(plan, before)
    parts = drop_duplicates(writer, before, {unit.number: files.redact(unit.shard) for unit in plan.units})
    dropped = sum(parts[number].num_rejects - before[number].num_rejects for number in parts)
    if dropped:
        say(f"{plan.output}: {dropped} rows have an id that an earlier part has; they are now rejects")
    limit.judge(parts.values())
    rows_in = sum(part.num_rows + part.num_rejects for part in before.values())  # as many as its reader gave, each
    manifest = writer.commit(rows_in=rows_in, parts=parts.values(), check_unique_ids=False)
    say(f"embedding store {plan.output}: {manifest.num_rows} rows, {manifest.num_rejects} rejects")
    return EmbeddingStore.open(plan.output)


def _check_rows(plan: EmbedPlan, parts: Mapping[int, PartInfo]) -> None:
    """Raise CirError for a part with more or fewer rows than the listing says. Shards were counted as they were read."""
    for unit in plan.units:
        part = parts.get(unit.number)
        if part is not None and unit.num_rows not in (None, part.num_rows + part.num_rejects):
            raise CirError(
                f"{files.redact(plan.output)}: {part.name} has {part.num_rows} rows and {part.num_rejects} rejects of "
                f"{files.redact(unit.shard)}, which has {unit.num_rows} there: the input was cut otherwise when it was "
                "written; choose another output folder, or remove this one"
            )


def _run(
    plans: Sequence[EmbedPlan],
    todo: list[dict[str, Any]],
    num_encoders: int,
    limits: Sequence[RejectLimit],
    tracker: Tracker | None,
) -> None:
    progress = EmbeddingProgress(len(todo), tracker)
    with progress, Reporter(progress.show) as reporter:
        dataset = ray.data.from_items(todo, override_num_blocks=min(len(todo), MAX_BLOCKS)).map_batches(
            ShardEmbedder,
            batch_size=1,
            compute=ActorPoolStrategy(
                size=num_encoders, max_concurrent_calls_per_actor=UNITS_AT_ONCE, enable_true_multi_threading=True
            ),
            num_cpus=ENCODER_CPUS,
            num_gpus=1 if plans[0].use_gpu else None,
            # The limits as they are now: what comes, an actor learns from the board.
            fn_constructor_args=([replace(plan, units=()) for plan in plans], reporter.board, copy.deepcopy(limits)),
        )
        dataset.context.target_max_block_size = 1  # each unit's row is told when it is there
        known: dict[int, list[PartInfo]] = {}
        for row in dataset.iter_rows():
            told = json.loads(str(row["told"]))
            part, number = part_info(told["part"]), told["plan"]
            progress.finished_unit()
            limits[number].count(part)
            limits[number].check()
            if part.num_rows and len(known.setdefault(number, [])) < 2:
                known[number].append(part)
                if len(known[number]) == 2:
                    _check_ids_differ(plans[number], known[number])


def _check_ids_differ(plan: EmbedPlan, parts: Sequence[PartInfo]) -> None:
    """Raise CirError if most ids of one part are in the other as well: keys are counted anew in every shard.

    The same image twice in a data set is no mistake (`drop_duplicates`); this is, and is better known early.
    """
    repeated = [row for rows in EmbeddingWriter(plan.output, plan.spec).duplicates(parts).values() for row in rows]
    if 2 * len(repeated) > min(part.num_rows for part in parts):
        raise CirError(
            f"ids repeat from shard to shard ({len(repeated)} of them, such as {repeated[0][0]!r}, in {parts[0].name} and "
            f"{parts[1].name}); with --ids shard an id is <shard name>/<key>. Give another --output then"
        )
