"""The driver of a retrieval run: find benchmarks and galleries, embed, search, evaluate, publish."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from rich.console import Console
from torch import Tensor

from cir_core import files
from cir_core.benchmarks import Benchmark
from cir_core.composition import mean_texts
from cir_core.embedding_store import EmbeddingStore
from cir_core.evaluation import EvaluationResult, evaluate, save_ranking
from cir_core.schema import Ranking
from jobs import tracking
from jobs.benchmark_parts import ImageSource, ImageSources, Part, find_parts
from jobs.config import flat_parameters, public
from jobs.embedder import EmbedPlan
from jobs.embedding import embed_stores, store_spec, store_uri
from jobs.gallery_search import Setting, settings_of
from jobs.models import ModelInfo, encode_captions
from jobs.retrieval import Prepared
from jobs.retrieval_outcomes import Outcome, Variant, ranking_file
from jobs.retrieval_report import log_outcomes, write_report, write_submissions
from jobs.retrieval_tables import print_report
from jobs.session import code_version, say
from jobs.start_up import StartUp
from jobs.storage import RunFolder, absolute, check_writable

if TYPE_CHECKING:
    from jobs.batch_retrieve import BatchRetrieveConfig

Results = dict[Setting, EvaluationResult]
# Settings that decide how a run is done and shown, not what it finds.
_HOW = ("name", "num_shards", "search_memory_gb", "num_encoders", "use_gpu", "batch_size", "contact_sheet_rows")
_WHERE = ("storage_path", "tracking_uri", "experiment")


def gallery_plan(config: BatchRetrieveConfig, source: ImageSource, variant: Variant) -> EmbedPlan:
    """Plan a variant's store of some images; its folder is named by its identity."""
    info = variant.info
    spec = store_spec(info.details, dtype="float32", captions=source.captions, input_digest=source.digest)
    return EmbedPlan(
        units=source.units,
        output=store_uri(config.storage_path, spec),
        spec=spec,
        model=info.model,
        pretrained=info.pretrained,
        adapter=info.adapter,
        preprocessing_mode=config.preprocessing_mode,
        captions=source.captions,
        batch_size=config.batch_size,
        use_gpu=config.use_gpu,
    )


@ray.remote(num_cpus=1, max_retries=5)
def _evaluate(ranking: Ranking, subsets: Ranking | None, benchmark: Benchmark, seed: int) -> EvaluationResult:
    return evaluate(ranking, benchmark, subset_ranking=subsets, num_resamples=2000, seed=seed)


class RetrievalRun:
    """One run: what is searched with what, step by step."""

    def __init__(self, config: BatchRetrieveConfig, parts: Sequence[Part], variants: Sequence[Variant]) -> None:
        self.config, self.parts, self.variants = config, parts, variants
        self.settings = settings_of(config.compared, config.sweep)
        both = [item for part in parts for item in (part.reported, part.selected) if item is not None]
        self.benchmarks = list({id(item): item for item in both}.values())
        sources = ImageSources(config)
        largest_first = sorted(self.benchmarks, key=lambda item: -len(item.image_ids))  # holds the others' images
        self.source_of = {id(item): sources.add(item) for item in largest_first}
        self.sources = sources.sources
        self.captioned = {id(item): sources.captioned(item) for item in self.benchmarks}
        self.texts: dict[int, Tensor] = {}
        self.about_texts: dict[int, dict[str, object]] = {}
        self.stores: dict[tuple[str, int], EmbeddingStore] = {}

    def inputs_digest(self) -> str:
        """Return a digest of all that is read: queries, galleries, protocols, pictures and captions."""
        digest = hashlib.sha256(" ".join(source.digest for source in self.sources).encode())
        for item in self.benchmarks:
            digest.update(repr((item.split, item.queries, item.gallery_ids, sorted(item.protocol.items()))).encode())
        return digest.hexdigest()

    def encode_texts(self) -> None:
        """Encode every query's captions; a query with several gets their mean."""
        captions = [[text for query in item.queries for text in query.captions] for item in self.benchmarks]
        config, base = self.config, self.variants[0].info
        encode = encode_captions.options(num_gpus=1 if config.use_gpu else 0)
        texts, truncated = ray.get(encode.remote(base, config.device, config.precision, captions))
        for item, found, cut, given in zip(self.benchmarks, texts, truncated, captions, strict=True):
            self.texts[id(item)] = mean_texts(found, [len(query.captions) for query in item.queries])
            empty = sum(not text for text in given)
            self.about_texts[id(item)] = {"texts_truncated": cut, "texts_empty": empty}
            images = f"{len(item.queries)} queries, {len(item.gallery_ids)} gallery images"
            say(f"{_named(item)}: {images}, {cut} texts truncated, {empty} empty")

    def embed(self) -> None:
        """Make the stores, or find them."""
        skip = self.config.missing_images == "skip"
        pairs = [(variant, number) for variant in self.variants for number in range(len(self.sources))]
        plans = [gallery_plan(self.config, self.sources[number], variant) for variant, number in pairs]
        stores = embed_stores(plans, num_encoders=self.config.num_encoders, max_rejects=None if skip else 0)
        self.stores = {(variant.label, number): store for (variant, number), store in zip(pairs, stores, strict=True)}

    def prepare(self, benchmark: Benchmark, variant: Variant) -> tuple[Prepared, Tensor]:
        """Return a benchmark and its texts ready for the search, without images that are to be left out."""
        store = self.stores[(variant.label, self.source_of[id(benchmark)])]
        texts, left = self.texts[id(benchmark)], benchmark
        if self.config.missing_images == "skip":
            lost = set(benchmark.image_ids) - set(store.read_ids())
            left = benchmark.without_images(lost) if lost else benchmark
            kept = {query.query_id for query in left.queries}
            texts = texts[[query.query_id in kept for query in benchmark.queries]]
        spec = store.manifest.spec
        made = {
            "model": spec.model,
            "weights": spec.weights,
            "weights_digest": spec.weights_digest,
            "adapter": public(variant.info.adapter or "none"),
            "adapter_digest": spec.adapter_digest or "none",
            "preprocessing": spec.preprocessing,
            "text_precision": variant.info.details.precision,
            "gallery_alpha": self.config.gallery_alpha,
            "store": store.identity,
            "code_version": code_version(),
            **self.captioned[id(benchmark)],
            **self.about_texts[id(benchmark)],
        }
        return Prepared.of(left, store, gallery_alpha=self.config.gallery_alpha, protocol=made), texts

    def search(
        self, benchmark: Benchmark, variant: Variant
    ) -> tuple[Benchmark, dict[Setting, Ranking], dict[Setting, Ranking], Results]:
        """Search once for all settings and score each; subset rankings and results are empty where there are none."""
        prepared, texts = self.prepare(benchmark, variant)
        shared: dict[str, Any] = {"num_shards": self.config.num_shards, "memory_gb": self.config.search_memory_gb}
        rankings = prepared.retrieve(texts, self.settings, k=self.config.k, **shared)
        subsets: dict[Setting, Ranking] = {}
        if prepared.benchmark.max_subset_k:
            subsets = prepared.retrieve_subsets(texts, self.settings, **shared)
        results: Results = {}
        if prepared.benchmark.has_targets:
            held = ray.put(prepared.benchmark)
            waiting = [
                _evaluate.remote(rankings[key], subsets.get(key), held, self.config.seed) for key in self.settings
            ]
            results = dict(zip(self.settings, ray.get(waiting), strict=True))
        return prepared.benchmark, rankings, subsets, results

    def outcomes(self, local: str, start_up: StartUp) -> list[Outcome]:
        """Search and score every part with every variant; the rankings go to files below `local`."""
        found: list[Outcome] = []
        for variant in self.variants:
            reported: list[tuple[Part, Benchmark, Results]] = []
            chosen_on: dict[str, list[Results]] = {}
            for part in self.parts:
                benchmark, rankings, subsets, results = self.search(part.reported, variant)
                if not found and not reported:
                    start_up.reached("first search")
                    say(f"first result after {start_up}")
                for method in self.config.compared:
                    _save(rankings, method, ranking_file(local, part, variant, method))
                    _save(subsets, method, ranking_file(local, part, variant, f"{method}.subset"))
                reported.append((part, benchmark, results))
                if part.selected is not None:
                    same = part.selected is part.reported
                    chosen_on.setdefault(part.group, []).append(
                        results if same else self.search(part.selected, variant)[3]
                    )
            for part, benchmark, results in reported:
                chosen = choose(chosen_on[part.group], benchmark.headline) if part.selected else self._given()
                found.append(Outcome(part, benchmark, variant, results, chosen, self.alpha_source, local))
            say(f"searched with {variant.label}: {variant.info.adapter or variant.info.model}")
        return found

    @property
    def alpha_source(self) -> str:
        """Where the reported alpha comes from."""
        if self.config.alpha is not None:
            return f"alpha {self.config.alpha:g} as given"
        same = self.parts[0].selected is self.parts[0].reported
        if self.parts[0].selected is None:
            return "no method has an alpha"
        return "alpha chosen on " + (
            "the same queries, so it is optimistic" if same else f"split {self.config.select_split!r}"
        )

    def _given(self) -> dict[str, float | None]:
        """Every method's alpha where the user gave it."""
        return {method: self.config.alpha if alpha is not None else None for method, alpha in self.settings}


def _named(benchmark: Benchmark) -> str:
    which = [str(benchmark.protocol[key]) for key in ("category", "task") if key in benchmark.protocol]
    return " ".join([str(benchmark), *which])


def _save(rankings: Mapping[Setting, Ranking], method: str, uri: str) -> None:
    by_alpha = {alpha: ranking for (name, alpha), ranking in rankings.items() if name == method}
    if by_alpha:
        save_ranking(by_alpha, uri)


def choose(results: Sequence[Results], headline: str) -> dict[str, float | None]:
    """Return each method's alpha with the best headline metric, averaged over categories; the smaller of equals."""
    chosen: dict[str, tuple[float, float | None]] = {}
    for method, alpha in results[0]:
        value = float(np.mean([result[(method, alpha)].metrics[headline] for result in results]))
        if method not in chosen or value > chosen[method][0]:
            chosen[method] = (value, alpha)
    return {method: alpha for method, (_, alpha) in chosen.items()}


def retrieve_and_report(
    config: BatchRetrieveConfig, models: Sequence[ModelInfo], tat_train_run: str, start_up: StartUp
) -> None:
    """Check everything, then embed, search, evaluate and publish.

    Args:
        config: the job's settings.
        models: the base model and, with an adapter, the tuned one.
        tat_train_run: name of the run that made the adapter, for the record; "" if that is not known.
        start_up: the moments so far.
    """
    uri = tracking.resolve_uri(config.tracking_uri)
    check_writable(absolute(config.storage_path), "storage_path")
    *untuned, last = models
    variants = [Variant("before TAT", info) for info in untuned]
    variants.append(Variant("after TAT" if untuned else "base model", last))
    job = RetrievalRun(config, find_parts(config), variants)
    start_up.reached("benchmark")
    made_of = {
        "encoders": [f"{info.details.identity} {info.details.precision}" for info in models],
        "inputs": job.inputs_digest(),
    }
    digest = hashlib.sha256(f"{config.digest(_HOW)} {made_of}".encode()).hexdigest()[:8]
    name = config.name or f"{config.benchmark}-{config.reported_split}-{digest}"
    folder = RunFolder(config.storage_path, "batch_retrieve", name)
    folder.claim({**config.model_dump(mode="json", exclude={*_HOW, *_WHERE}), **made_of})
    tags = {"job": "batch_retrieve", "code_version": code_version(), "benchmark": config.benchmark}
    parameters = flat_parameters(config) | {"adapter_uri": last.adapter or "none", "tat_train_run": tat_train_run}
    start = partial(tracking.Tracker.start, uri, experiment=config.experiment, tags=tags)
    parent = start(name=name, parameters=parameters)
    start_up.reached("tracking")
    say(f"MLflow: {parent.page}")
    children: dict[str, tracking.Tracker] = {}
    with tempfile.TemporaryDirectory() as local:
        try:
            job.encode_texts()
            start_up.reached("texts")
            job.embed()
            start_up.reached("images")
            outcomes = job.outcomes(local, start_up)
            submissions = write_submissions(outcomes)
            method = "slerp" if "slerp" in config.compared else config.compared[0]
            write_report(outcomes, method=method, num_rows=config.contact_sheet_rows)
            for path in sorted(Path(local).rglob("*")):
                if path.is_file():
                    files.write_bytes(folder.path(*path.relative_to(local).parts), path.read_bytes())
            folder.commit({"name": name, "adapter": last.adapter, **start_up.record()})
        except BaseException:
            tracking.publish(lambda: parent.finish("FAILED"), patience_s=5)
            raise

        def record() -> None:
            parent.log_metrics({f"start_up_s/{stage}": spent for stage, spent in start_up.seconds().items()})
            log_outcomes(outcomes, name, method, start=start, parent=parent, children=children)
            parent.log_folder(local)
            parent.finish()

        tracking.publish(record)
        print_report(Console(width=140), outcomes, method=method)
        for written in submissions:
            say(f"for the test server: {folder.path(written)}")
    say(f"results: {folder.uri}\nMLflow: {parent.page}")
