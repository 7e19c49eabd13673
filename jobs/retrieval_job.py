"""The driver of a retrieval run: find benchmark and galleries, embed, search, evaluate, publish."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from rich.console import Console
from torch import Tensor

from cir_core import files, scenes
from cir_core.benchmarks import Benchmark, load_benchmark
from cir_core.embedding_store import EmbeddingStore
from cir_core.evaluation import EvaluationResult, evaluate
from cir_core.schema import CirError, Ranking
from jobs import tracking
from jobs.config import flat_parameters
from jobs.embedder import EmbedPlan
from jobs.embedding import embed_stores, find_units, store_spec, store_uri
from jobs.models import ModelInfo
from jobs.retrieval import Prepared, Setting, settings_of
from jobs.retrieval_report import (
    SCENES_NOTE,
    Outcome,
    Variant,
    comparisons_table,
    log_variant,
    per_query_columns,
    results_table,
    write_report,
)
from jobs.session import code_version, say
from jobs.storage import RunFolder, absolute, check_writable

if TYPE_CHECKING:
    from jobs.batch_retrieve import BatchRetrieveConfig


def find_benchmarks(config: BatchRetrieveConfig, splits: Sequence[str]) -> list[Benchmark]:
    """Load the splits, generating scenes first where they are absent."""
    root = config.root
    if config.benchmark == "scenes" and not root:
        root = files.join(
            absolute(config.storage_path), "data", f"scenes-benchmark-{config.num_queries}-seed{config.seed}"
        )
        missing = [split for split in splits if not files.exists(files.join(root, split, "benchmark.json"))]
        if missing:
            say(f"generating {config.num_queries} composed queries each for {' and '.join(missing)} in {root}")
        write = ray.remote(num_cpus=1)(scenes.write_benchmark)
        ray.get([write.remote(root, split, config.num_queries, seed=config.seed) for split in missing])
    if not root:
        raise CirError(f"--root is needed: the folder that holds benchmark {config.benchmark!r}")
    found = [load_benchmark(config.benchmark, root, split, **config.protocol) for split in splits]
    if not all(benchmark.image_shards for benchmark in found):
        raise CirError(
            f"batch_retrieve cannot run benchmark {config.benchmark!r} yet, only those whose gallery comes as image-text shards; "
            "the library scores rankings for it: cir_core.evaluation.evaluate"
        )
    return found


def gallery_plan(config: BatchRetrieveConfig, benchmark: Benchmark, variant: Variant) -> EmbedPlan:
    """Plan a variant's store of a benchmark's gallery; its folder is named by its identity."""
    info = variant.info
    units, digest = find_units(benchmark.image_shards)
    spec = store_spec(info.details, dtype="float32", captions="text", input_digest=digest)
    return EmbedPlan(
        units=tuple(units),
        output=store_uri(config.storage_path, spec),
        spec=spec,
        model=info.model,
        pretrained=info.pretrained,
        adapter=info.adapter,
        precision=config.precision,
        preprocessing_mode=None,
        captions="text",
        batch_size=config.batch_size,
        use_gpu=config.use_gpu,
    )


def score(
    config: BatchRetrieveConfig, benchmark: Benchmark, store: EmbeddingStore, texts: Tensor
) -> tuple[dict[Setting, Ranking], dict[Setting, EvaluationResult]]:
    """Search a gallery once for all settings, and evaluate each."""
    settings = settings_of(config.methods, config.alphas)
    prepared = Prepared.of(benchmark, store, protocol={"store": store.identity})
    rankings = prepared.retrieve(texts, settings, k=config.k, num_shards=config.num_shards)
    return rankings, {
        key: evaluate(ranking, benchmark, num_resamples=2000, seed=config.seed) for key, ranking in rankings.items()
    }


def choose(results: Mapping[Setting, EvaluationResult], headline: str) -> dict[str, float | None]:
    """Return each method's alpha with the best headline metric; the smaller of equals."""
    chosen: dict[str, tuple[float, float | None]] = {}
    for (method, alpha), result in results.items():
        value = result.metrics[headline]
        if method not in chosen or value > chosen[method][0]:
            chosen[method] = (value, alpha)
    return {method: alpha for method, (_, alpha) in chosen.items()}


def run_variants(
    config: BatchRetrieveConfig,
    inspector: Any,
    variants: Sequence[Variant],
    reported: Benchmark,
    selected: Benchmark,
) -> list[Outcome]:
    """Score every variant on both splits; alpha comes from `selected`, the scores from `reported`."""
    splits = [reported] if selected is reported else [reported, selected]
    captions = [[query.relative_caption for query in benchmark.queries] for benchmark in splits]
    texts, truncated = ray.get(inspector.encode_captions.remote(captions))
    ray.kill(inspector)  # its GPU or memory is for the embedders
    plans = [gallery_plan(config, benchmark, variant) for variant in variants for benchmark in splits]
    stores = iter(embed_stores(plans, num_encoders=config.num_encoders, max_rejects=0))
    for benchmark, cut in zip(splits, truncated, strict=True):
        gallery = len(benchmark.gallery_ids)
        say(f"{benchmark}: {len(benchmark.queries)} queries, {gallery} gallery images, {cut} captions truncated")
    outcomes = []
    for variant in variants:
        scored = [score(config, item, next(stores), text) for item, text in zip(splits, texts, strict=True)]
        rankings, results = scored[0]
        outcomes.append(Outcome(variant, rankings, results, choose(scored[-1][1], reported.headline)))
        say(f"scored {variant.label}: {variant.info.adapter or variant.info.model}")
    return outcomes


def retrieve_and_report(
    config: BatchRetrieveConfig, inspector: Any, models: Sequence[ModelInfo], tat_train_run: str
) -> None:
    """Check everything, then embed, search, evaluate and publish.

    Args:
        config: the job's settings.
        inspector: the actor that described them and encodes captions.
        models: the base model and, with an adapter, the tuned one.
        tat_train_run: name of the run that made the adapter, for the record; "" if that is not known.
    """
    uri = tracking.resolve_uri(config.tracking_uri)
    check_writable(absolute(config.storage_path), "storage_path")
    *untuned, last = models
    variants = [Variant("before TAT", info) for info in untuned]
    variants.append(Variant("after TAT" if untuned else "base model", last))
    splits = list(dict.fromkeys([config.split, config.select_split or config.split]))
    reported, *others = find_benchmarks(config, splits)
    selected = others[0] if others else reported
    needed = reported.max_k + reported.reference_removed
    if config.k < needed:
        raise CirError(f"--k {config.k} is too short for {reported.metrics}: use at least {needed}")
    name = config.name or f"{config.benchmark}-{config.split}-{config.digest(['name'])}"
    folder = RunFolder(config.storage_path, "batch_retrieve", name)
    tags = {"job": "batch_retrieve", "code_version": code_version(), "benchmark": config.benchmark}
    parameters = flat_parameters(config) | {
        "adapter_uri": last.adapter or "none",
        "tat_train_run": tat_train_run,
    }
    start = partial(tracking.Tracker.start, uri, experiment=config.experiment, tags=tags)
    parent = start(name=name, parameters=parameters)
    say(f"MLflow: {parent.page}")
    try:
        outcomes = run_variants(config, inspector, variants, reported, selected)
    except BaseException:
        tracking.publish(lambda: parent.finish("FAILED"), patience_s=5)
        raise
    shown = "slerp" if "slerp" in config.methods else config.methods[0]
    with tempfile.TemporaryDirectory() as local:
        write_report(outcomes, reported, local, method=shown, num_rows=config.contact_sheet_rows)
        for path in sorted(Path(local).rglob("*")):
            if path.is_file():
                files.write_bytes(folder.path(*path.relative_to(local).parts), path.read_bytes())
        folder.commit({"name": name, "adapter": last.adapter})

        def record() -> None:
            for outcome in outcomes:
                about = {"encoder": outcome.variant.label, "model": outcome.variant.info.model,
                         "adapter": outcome.variant.info.adapter or "none"}  # fmt: skip
                label = f"{name} {outcome.variant.label}"
                child = start(name=label, parameters=parameters | about, parent=parent)
                log_variant(child, outcome, reported.headline)
            parent.log_metrics(outcomes[-1].best(shown).metrics)
            parent.log_table(per_query_columns(outcomes, reported, shown), "per_query.json")
            parent.log_folder(local)
            parent.finish()

        tracking.publish(record)
    console = Console(width=140)
    console.print(results_table(outcomes, reported))
    differences = comparisons_table(outcomes, reported, shown)
    if differences.row_count:
        console.print(differences)
    chosen_on = "the same queries, so it is optimistic" if selected is reported else f"split {selected.split!r}"
    say(f"alpha chosen on {chosen_on}. {SCENES_NOTE if reported.name == 'scenes' else ''}")
    say(f"results: {folder.uri}\nMLflow: {parent.page}")
