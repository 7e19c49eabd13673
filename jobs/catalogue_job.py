"""The driver of a catalogue's queries: check everything, answer part by part, commit the counts, publish."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray

from cir_core import files
from cir_core.benchmarks import list_query_files, near_matches
from cir_core.benchmarks.custom import metrics_up_to
from cir_core.embedding_store import EmbeddingStore
from cir_core.evaluation import total_scores
from cir_core.schema import CirError
from cir_core.shards import list_shards
from jobs import tracking
from jobs.catalogue import CatalogueRun, EncoderChoice, PartPipeline, QueryEncoder, label
from jobs.catalogue_approximate import ApproximatePlan, ApproximateSearch, plan_approximate
from jobs.catalogue_checks import CheckedQueries, check_queries
from jobs.catalogue_encoder import check_encoder, choose_encoder
from jobs.catalogue_lookup import StoreIds
from jobs.catalogue_recall import measure_recall, sample_sizes, sample_uri
from jobs.catalogue_report import publish, results_table, write_sheet
from jobs.config import flat_parameters, public, resolve_precision
from jobs.decoding import embedding_resources
from jobs.gallery_search import Gallery, GallerySearch, Setting, settings_of
from jobs.models import ModelInfo, inspect_model
from jobs.progress import UnitGauge
from jobs.reject_limit import some_rejects
from jobs.session import check_resources, code_version, connect, say
from jobs.storage import CHECK_S, RunFolder, absolute, check_writable

if TYPE_CHECKING:
    from jobs.batch_retrieve import BatchRetrieveConfig

_FOR_BENCHMARKS = (  # settings of the other benchmarks; the store decides the preprocessing
    "root", "split", "select_split", "num_queries", "gallery_ids", "gallery_captions", "missing_images",
    "preprocessing_mode",
)  # fmt: skip
DEFAULT_SETTING = ("slerp", 0.8)  # the paper's alpha for CIRCO and FashionIQ
_READERS = 16  # small files that are read at once


def answer_queries(config: BatchRetrieveConfig) -> None:
    """Answer the queries of `config.queries` from the store `config.gallery`; finished parts are kept."""
    tracking_uri = tracking.resolve_uri(config.tracking_uri)
    tracking.check_server(tracking_uri)
    check_writable(absolute(config.storage_path), "storage_path")
    with files.patience(CHECK_S):
        uris, store, removed = _inputs(config)
        plan = plan_approximate(config, store)
    choice = choose_encoder(config, store, tracking_uri)
    connect()
    check_resources(embedding_resources(config.num_encoders, use_gpu=config.use_gpu))
    describing = inspect_model.remote(
        choice.model,
        choice.pretrained,
        choice.adapter,
        preprocessing_mode=choice.preprocessing_mode,
        decode=choice.decode,
    )
    checked = check_queries(uris, store, part_rows=config.queries_per_part, reference_removed=removed)
    if plan and checked.counts.have_subsets:
        raise CirError("--approximate: queries with subset_ids rank only those, always exactly; leave it out")
    info = ray.get(describing)
    check_encoder(store, info)
    run, folder = _claim(config, store, checked, info, removed, plan)
    recorded = folder.path("mlflow.json")
    tracker = tracking.Tracker.start(
        tracking_uri,
        experiment=config.experiment,
        name=folder.name,
        parameters=flat_parameters(config) | {"run_folder": folder.uri, "store_identity": store.identity},
        tags={"job": "batch_retrieve", "code_version": code_version(), "benchmark": "custom"},
        run_id=files.read_json(recorded)["run_id"] if files.exists(recorded) else None,
    )
    files.write_json(recorded, {"run_id": tracker.run_id})
    counts = checked.counts
    say(
        f"run {folder.name}: {counts.num_queries} queries in {len(uris)} files and {len(checked.parts)} parts, "
        f"{counts.num_empty_captions} with an empty caption; {store.num_rows} gallery images; "
        f"settings {', '.join(label(*key) for key in run.settings)}\n"
        + (f"{plan.described}\n" if plan else "")
        + f"MLflow: {tracker.page}"
    )
    try:
        speed = _answer_all(config, run, checked, choice, plan)
        approximate = _measured(config, run, plan) if plan else {}
        result = _commit(config, folder, run, checked, info, approximate)
        write_sheet(config, run, checked.parts, folder)
    except BaseException:
        tracking.publish(lambda: tracker.finish("FAILED"), patience_s=5)
        raise
    tracking.publish(lambda: publish(tracker, folder, run, result, speed))
    results_table(result, folder, tracker.page)


def _inputs(config: BatchRetrieveConfig) -> tuple[list[str], EmbeddingStore, bool]:
    """Return the queries files, the store, and whether references are removed from their own lists."""
    for name, value in (("queries", config.queries), ("gallery", config.gallery)):
        if not value:
            raise CirError(f"--{name} is needed with --benchmark custom; --help says what it is")
    config.refuse(_FOR_BENCHMARKS, "with --benchmark custom")
    for option in config.protocol:
        if option != "reference":
            raise CirError(f"protocol: unknown option {option!r}; {near_matches(option, ['reference'])}")
    reference = config.protocol.get("reference", "removed")
    if reference not in ("removed", "kept"):
        raise CirError(f"protocol: reference must be 'removed' or 'kept', not {reference!r}")
    store = EmbeddingStore.open(absolute(config.gallery))
    if store.num_rows < 2:
        raise CirError(f"{public(store.uri)}: holds {store.num_rows} images; a search needs at least two")
    images = absolute(config.gallery_images) if config.gallery_images else ""
    if images and not files.is_folder(images):
        list_shards(images)  # raises for what is neither
    if config.gallery_alpha and "caption_embedding" not in store.manifest.columns:
        raise CirError(
            f"--gallery_alpha: {public(store.uri)} holds no embeddings of captions; make it with embed.py --captions embed"
        )
    return list_query_files(absolute(config.queries)), store, reference == "removed"


def _settings(config: BatchRetrieveConfig) -> tuple[Setting, ...]:
    """Return the methods and alphas to report: a sweep is for benchmarks, so here it has to be asked for."""
    method, default = DEFAULT_SETTING
    if not config.methods and not config.alphas and config.alpha is None:
        say(f"no --methods, --alphas or --alpha given: {label(*DEFAULT_SETTING)} alone")
    alphas = config.sweep if config.alphas else [default if config.alpha is None else config.alpha]
    return tuple(settings_of(config.methods or [method], alphas))


def _claim(
    config: BatchRetrieveConfig,
    store: EmbeddingStore,
    checked: CheckedQueries,
    info: ModelInfo,
    removed: bool,
    plan: ApproximatePlan | None,
) -> tuple[CatalogueRun, RunFolder]:
    """Take the run's folder for what decides its results; its name is made of that."""
    settings = _settings(config)
    made: dict[str, object] = {
        "store": store.identity,
        "gallery_size": store.num_rows,
        "gallery_alpha": config.gallery_alpha,
        "reference": "removed" if removed else "kept",
        "model": info.details.model,
        "weights": info.details.pretrained or "own",
        "weights_digest": info.details.weights_digest,
        "adapter_digest": info.details.adapter_digest or "",
        "preprocessing": info.details.preprocessing_tag,
        "precision": resolve_precision(config.precision, use_gpu=config.use_gpu),
        **({"search": plan.described} if plan else {}),
    }
    claim = made | {
        "queries": checked.digest,
        "num_queries": checked.counts.num_queries,
        "queries_per_part": config.queries_per_part,
        "settings": [list(key) for key in settings],
        "k": config.k,
        **({"approximate": plan.claim} if plan else {}),
    }
    digest = hashlib.sha256(json.dumps(claim, sort_keys=True).encode()).hexdigest()
    folder = RunFolder(config.storage_path, "batch_retrieve", config.name or f"custom-{digest[:12]}")
    folder.claim(claim)
    run = CatalogueRun(
        store=store.uri,
        folder=folder.uri,
        settings=settings,
        k=config.k,
        metrics=metrics_up_to(config.k) if checked.counts.have_targets else (),
        gallery_size=store.num_rows,
        reference_removed=removed,
        allow_rejects=config.max_rejects != 0,
        made=made,
    )
    return run, folder


def finished_parts(run: CatalogueRun) -> dict[int, dict[str, Any]]:
    """Return the markers of the parts whose result files, and share of a sample, are there, whole."""
    progress = files.join(run.folder, "_progress")
    if not files.exists(progress):
        return {}
    markers = [item.uri for item in files.list_files(progress, recursive=False) if item.name.startswith("part-")]
    with ThreadPoolExecutor(_READERS) as readers:
        found = list(readers.map(files.read_json, markers))
    results = files.join(run.folder, "results")
    sizes = {item.name: item.size_bytes for item in files.list_files(results)} if files.exists(results) else {}
    return {
        marker["part"]: marker
        for marker in found
        if all(
            sizes.get(f"{method}/part-{marker['part']:05d}.parquet") == size
            for method, size in marker["size_bytes"].items()
        )
        and (not marker.get("num_sampled") or files.exists(sample_uri(run.folder, marker["part"])))
    }


def _answer_all(
    config: BatchRetrieveConfig,
    run: CatalogueRun,
    checked: CheckedQueries,
    choice: EncoderChoice,
    plan: ApproximatePlan | None,
) -> dict[str, float]:
    """Answer the parts that are not finished; return queries per second, and the seconds that indexes took."""
    done = finished_parts(run)
    if 0 <= config.max_rejects < sum(marker["num_rejects"] for marker in done.values()):
        done = {number: marker for number, marker in done.items() if not marker["num_rejects"]}  # repaired, perhaps
    todo = [number for number in range(len(checked.parts)) if number not in done]
    if not todo:
        say(f"all {len(done)} parts are finished")
        return {}
    if done:
        say(f"{len(done)} of {len(checked.parts)} parts are finished, going on with the rest")
    total = sum(checked.parts[number].num_queries for number in todo)
    rejects = sum(marker["num_rejects"] for marker in done.values())
    search = ApproximateSearch(plan) if plan else _exact(config, run, len(todo))
    measured = {"index_seconds": search.prepare()} if isinstance(search, ApproximateSearch) else {}
    actor = ray.remote(max_restarts=5, max_task_retries=5)(QueryEncoder)
    pool = actor.options(num_cpus=0.5, num_gpus=1 if config.use_gpu else 0)
    encoders = [pool.remote(choice) for _ in range(min(config.num_encoders, len(todo)))]
    per_part = [part.num_queries for part in checked.parts]
    sizes = sample_sizes(per_part, plan.recall_queries, plan.seed) if plan else {}
    holders = search.actors if isinstance(search, GallerySearch) else ()
    ids = StoreIds(run.store, search.shares, num_tiles=len(todo), holders=holders)
    pipeline = PartPipeline(run, search, ids, encoders, sizes, config.seed)
    started, last, answered = time.perf_counter(), 0.0, 0
    try:
        with UnitGauge("batch_retrieve", "queries") as queries:
            queries.show(0, total)
            for marker in _completed(pipeline, checked, todo, len(encoders) + 2):
                answered += marker["num_queries"]
                rejects += marker["num_rejects"]
                _limit_rejects(config, run, rejects)
                queries.show(answered, total)
                elapsed = time.perf_counter() - started
                if elapsed - last > 5 or answered == total:
                    last = elapsed
                    say(
                        f"answered {answered}/{total} queries ({100 * answered / total:.0f} %)  {answered / elapsed:.0f} queries/s  "
                        f"{rejects} rejects  ETA {elapsed / answered * (total - answered):.0f} s"
                    )
    finally:
        for encoder in encoders:
            ray.kill(encoder)  # their CPUs and GPUs are free at once, also after an error
        ids.close()
        if isinstance(search, ApproximateSearch):
            search.close()
    return measured | {"queries_per_second": answered / max(time.perf_counter() - started, 1e-9)}


def _exact(config: BatchRetrieveConfig, run: CatalogueRun, num_tiles: int) -> GallerySearch:
    gallery = Gallery(run.store, alpha=config.gallery_alpha)
    return GallerySearch(gallery, config.num_shards, memory_gb=config.search_memory_gb, num_tiles=num_tiles)


def _measured(config: BatchRetrieveConfig, run: CatalogueRun, plan: ApproximatePlan) -> dict[str, Any]:
    """Return how was searched, and for each setting the recall against exact search that was measured for it."""
    markers = finished_parts(run)
    described = {"search": plan.described, "index": plan.folder}
    if not any(marker["num_answered"] for marker in markers.values()):
        return {**described, "num_sampled": 0, "recall": {}}
    parts = sorted(number for number, marker in markers.items() if marker["num_sampled"])
    found = measure_recall(plan.gallery, run.folder, parts, run.settings, k=run.k, num_shards=config.num_shards)
    recall = {label(*key): one for key, one in zip(run.settings, found["recall"], strict=True)}
    return {**described, "num_sampled": found["num_sampled"], "recall": recall}


def _completed(
    pipeline: PartPipeline, checked: CheckedQueries, todo: Sequence[int], limit: int
) -> Iterator[dict[str, Any]]:
    """Yield the markers of parts as they end, with at most `limit` parts under way: that bounds the memory they take."""
    waiting: list[Any] = []
    for number in todo:
        if len(waiting) == limit:
            (ready,), waiting = ray.wait(waiting)
            yield ray.get(ready)
        waiting.append(pipeline.start(number, checked.parts[number]))
    while waiting:
        (ready,), waiting = ray.wait(waiting)
        yield ray.get(ready)


def _limit_rejects(config: BatchRetrieveConfig, run: CatalogueRun, rejects: int) -> None:
    if 0 <= config.max_rejects < rejects:
        raise CirError(
            f"{rejects} queries have a reference picture that cannot be used, more than the {config.max_rejects} of "
            f"--max_rejects: {'; '.join(some_rejects(item.uri for item in files.list_files(files.join(run.folder, 'rejects'))))}. Repair them, or allow more"
        )


def _commit(
    config: BatchRetrieveConfig,
    folder: RunFolder,
    run: CatalogueRun,
    checked: CheckedQueries,
    info: ModelInfo,
    approximate: dict[str, Any],
) -> dict[str, Any]:
    """Check that every query is answered or rejected, and mark the run as finished; return what is recorded."""
    markers = finished_parts(run)
    sums = {
        key: sum(marker[key] for marker in markers.values())
        for key in ("num_queries", "num_answered", "num_rejects", "num_truncated")
    }
    _limit_rejects(config, run, sums["num_rejects"])
    if (
        sums["num_queries"] != checked.counts.num_queries
        or sums["num_answered"] + sums["num_rejects"] != sums["num_queries"]
    ):
        raise RuntimeError(f"{checked.counts.num_queries} queries in, {sums}: nothing is committed")
    before = folder.result()
    if before is not None and sums.items() <= before.items():  # the same parts, so the same result
        return before
    scores = {
        label(*key): {
            metric: [interval.mean, interval.low, interval.high]
            for metric, interval in total_scores(
                (marker["scores"].get(label(*key), {}) for marker in markers.values()), seed=config.seed
            ).items()
        }
        for key in run.settings
        if run.metrics
    }
    result = {
        "name": folder.name,
        **sums,
        "num_parts": len(markers),
        "num_empty_captions": checked.counts.num_empty_captions,
        "settings": [list(key) for key in run.settings],
        "k": run.k,
        "queries": config.queries,
        "gallery": config.gallery,
        "adapter": info.adapter,
        **run.made,
        "scores": scores,
        **({"approximate": approximate} if approximate else {}),
        "code_version": code_version(),
    }
    folder.commit(result)
    return folder.result() or {}
