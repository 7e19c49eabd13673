"""Ray: sharded composed retrieval and evaluation, before and after an adapter, all methods and alphas side by side.

    ray job submit -- python jobs/batch_retrieve.py                        # scenes, newest finished tat_train run
    ray job submit -- python jobs/batch_retrieve.py --adapter none --alphas '[0.5, 0.8]' --methods '[slerp, sum]'
    python jobs/batch_retrieve.py --help                                   # every setting

The gallery's embedding stores are made if absent and reused by identity. alpha is chosen on one split and reported on
another. Results: <storage_path>/batch_retrieve/<name>/ and MLflow: a parent run with a child per encoder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import ray
from pydantic import Field, PositiveInt, field_validator
from rich.console import Console
from torch import Tensor

from cir_core import files, scenes
from cir_core.benchmarks import Benchmark, load_benchmark, protocol_options
from cir_core.composition import METHODS, takes_alpha
from cir_core.embedding_store import EmbeddingStore
from cir_core.encoders import load_encoder
from cir_core.evaluation import EvaluationResult, evaluate
from cir_core.lora import TatMetadata, local_adapter
from cir_core.schema import CirError, Ranking
from jobs import tracking
from jobs.config import JobConfig, flat_parameters, parse_config
from jobs.embedding import DECODER_CPUS, EmbedPlan, embed_stores, find_units, store_spec
from jobs.retrieval import Setting, encode_captions, retrieve, settings_of
from jobs.retrieval_report import (
    SCENES_NOTE,
    Outcome,
    Variant,
    comparison_line,
    log_variant,
    per_query_columns,
    results_table,
    write_report,
)
from jobs.session import check_resources, code_version, connect, run, say
from jobs.storage import RunFolder, absolute, check_writable

NEWEST, NONE = "newest", "none"


class BatchRetrieveConfig(JobConfig):
    """Settings of a retrieval run."""

    name: str = Field("", description="Run name. Empty: made from the settings.")
    benchmark: str = Field("scenes", description="Benchmark name.")
    root: str = Field("", description="The benchmark's folder. Empty with 'scenes': generated under storage_path.")
    split: str = Field("test", description="Split that is reported.")
    select_split: str = Field("val", description="Split on which alpha is chosen; empty: the reported split itself.")
    num_queries: PositiveInt = Field(
        300, description="Queries per split to generate for 'scenes'; eleven pictures each."
    )
    seed: int = Field(0, description="Seed of the generated benchmark and of the bootstrap.")
    protocol: dict[str, Any] = Field(
        {}, description='Protocol options of the benchmark, e.g. \'{"reference": "kept"}\'.'
    )
    model: str = Field("", description="Model; empty: the adapter's base model, or 'scenes-tiny' without an adapter.")
    pretrained: str | None = Field(None, description="Weights tag of a named model, or a .safetensors file.")
    adapter: str = Field(
        NEWEST,
        description="PEFT adapter folder or URI; 'newest': of the newest finished tat_train run of the experiment; "
        "'none': the base model alone.",
    )
    methods: list[str] = Field(list(METHODS), description="Composition methods.")
    alphas: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [round(0.1 * step, 1) for step in range(11)],
        description="Text weights of the sweep; 0 image only, 1 text only.",
    )
    k: PositiveInt = Field(60, description="Length of the rankings; at least the benchmark's deepest metric.")
    num_shards: PositiveInt = Field(2, description="Tasks that share the gallery; the result does not depend on it.")
    batch_size: PositiveInt = Field(256, description="Images per encoder call.")
    num_encoders: PositiveInt = Field(1, description="Actors that embed a missing gallery.")
    use_gpu: bool = Field(False, description="One GPU per encoder.")
    precision: str = Field("auto", description="auto: bf16 autocast on CUDA, fp32 on CPU.")
    contact_sheet_rows: PositiveInt = Field(40, description="Queries shown with pictures.")

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: list[str]) -> list[str]:
        for name in methods:
            takes_alpha(name)  # an unknown name is an error that lists the known ones
        if not methods or len(set(methods)) != len(methods):
            raise ValueError("methods must name at least one method, none twice")
        return methods

    @field_validator("alphas")
    @classmethod
    def _some(cls, alphas: list[float]) -> list[float]:
        if not alphas or len(set(alphas)) != len(alphas):
            raise ValueError("alphas must hold at least one value, none twice")
        return sorted(alphas)


def find_adapter(config: BatchRetrieveConfig, uri: str) -> tuple[str | None, dict[str, str] | None]:
    """Return the adapter's URI (None: base model alone) and the tat_train run it comes from, if known."""
    if config.adapter == NONE:
        return None, None
    if config.adapter != NEWEST:
        return config.adapter, None
    found = tracking.latest_finished(uri, config.experiment, "tat_train")
    if found is None:
        raise CirError(
            f"no finished tat_train run in experiment {config.experiment!r} at {uri}: run jobs/tat_train.py first, or set "
            "--adapter to a PEFT folder or to none"
        )
    return found["adapter_uri"], found


def find_variants(config: BatchRetrieveConfig, adapter: str | None) -> list[Variant]:
    """Return the base model and, with an adapter, the tuned one."""
    model, pretrained = config.model or "scenes-tiny", config.pretrained
    if adapter is not None:
        with local_adapter(adapter) as folder:
            tat = TatMetadata.read(folder)
        model, pretrained = config.model or tat.base_model, config.pretrained or tat.pretrained
    base = Variant("before TAT" if adapter else "base model", model, pretrained, None)
    return [base, Variant("after TAT", model, pretrained, adapter)] if adapter else [base]


def find_benchmark(config: BatchRetrieveConfig, split: str) -> Benchmark:
    """Load a split, generating scenes first where they are absent."""
    root = config.root
    if config.benchmark == "scenes" and not root:
        root = files.join(
            absolute(config.storage_path), "data", f"scenes-benchmark-{config.num_queries}-seed{config.seed}"
        )
        if not files.exists(files.join(root, split, "benchmark.json")):
            say(f"generating {config.num_queries} composed queries ({split}) in {root}")
            scenes.write_benchmark(root, split, config.num_queries, seed=config.seed)
    if not root:
        raise CirError(f"--root is needed: the folder that holds benchmark {config.benchmark!r}")
    return load_benchmark(config.benchmark, root, split, **config.protocol)


def gallery_plan(config: BatchRetrieveConfig, benchmark: Benchmark, variant: Variant) -> EmbedPlan:
    """Plan a variant's store of a benchmark's gallery; its folder is named by its identity."""
    encoder = load_encoder(variant.model, variant.pretrained, variant.adapter, "cpu")
    units, digest = find_units(benchmark.image_shards)
    spec = store_spec(encoder, dtype="float32", captions="text", input_digest=digest)
    return EmbedPlan(
        units=tuple(units),
        output=files.join(absolute(config.storage_path), "stores", spec.identity.removeprefix("sha256:")[:16]),
        spec=spec,
        model=variant.model,
        pretrained=variant.pretrained,
        adapter=variant.adapter,
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
    rankings = retrieve(benchmark, store, texts, settings, k=config.k, num_shards=config.num_shards)
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
    config: BatchRetrieveConfig, variants: Sequence[Variant], reported: Benchmark, selected: Benchmark
) -> list[Outcome]:
    """Score every variant on both splits; alpha comes from `selected`, the scores from `reported`."""
    splits = [reported] if selected is reported else [reported, selected]
    captions = [[query.relative_caption for query in benchmark.queries] for benchmark in splits]
    encoded = encode_captions.remote(variants[0].model, variants[0].pretrained, captions)
    plans = [gallery_plan(config, benchmark, variant) for variant in variants for benchmark in splits]
    stores = iter(embed_stores(plans, num_encoders=config.num_encoders, max_rejects=0))
    texts, truncated = ray.get(encoded)
    for benchmark, cut in zip(splits, truncated, strict=True):
        gallery = len(benchmark.gallery_ids)
        say(f"{benchmark}: {len(benchmark.queries)} queries, {gallery} gallery images, {cut} captions truncated")
    outcomes = []
    for variant in variants:
        scored = [score(config, item, next(stores), text) for item, text in zip(splits, texts, strict=True)]
        rankings, results = scored[0]
        outcomes.append(Outcome(variant, rankings, results, choose(scored[-1][1], reported.headline)))
        say(f"scored {variant.label}: {variant.adapter or variant.model}")
    return outcomes


def main() -> None:
    """Check everything, then embed, search, evaluate and publish."""
    config = parse_config(BatchRetrieveConfig, "batch_retrieve", __doc__.split("\n")[0])
    protocol_options(config.benchmark)  # an unknown benchmark is an error that lists the known ones
    uri = tracking.resolve_uri(config.tracking_uri)
    tracking.check_server(uri)
    check_writable(absolute(config.storage_path), "storage_path")
    adapter, source = find_adapter(config, uri)
    if source:
        say(f"adapter of tat_train run {source['name']} ({source['run_id']}): {adapter}")
    variants = find_variants(config, adapter)
    for variant in variants:
        load_encoder(variant.model, variant.pretrained, variant.adapter, "cpu")
    reported = find_benchmark(config, config.split)
    split = config.select_split or config.split
    selected = reported if split == config.split else find_benchmark(config, split)
    if config.k < reported.max_k + reported.reference_removed:
        raise CirError(f"--k {config.k} is too short for {reported.metrics}: use at least {reported.max_k + 1}")
    connect()
    check_resources({"CPU": 0.5 + DECODER_CPUS} | ({"GPU": float(config.num_encoders)} if config.use_gpu else {}))
    name = config.name or f"{config.benchmark}-{config.split}-{config.digest(['name'])}"
    folder = RunFolder(config.storage_path, "batch_retrieve", name)
    tags = {"job": "batch_retrieve", "code_version": code_version(), "benchmark": config.benchmark}
    parameters = flat_parameters(config) | {
        "adapter_uri": adapter or NONE,
        "tat_train_run": (source or {}).get("name", ""),
    }
    start = partial(tracking.Tracker.start, uri, experiment=config.experiment, tags=tags)
    parent = start(name=name, parameters=parameters)
    say(f"MLflow: {parent.page}")
    try:
        outcomes = run_variants(config, variants, reported, selected)
    except BaseException:
        tracking.publish(lambda: parent.finish("FAILED"), patience_s=5)
        raise
    shown = "slerp" if "slerp" in config.methods else config.methods[0]
    with tempfile.TemporaryDirectory() as local:
        write_report(outcomes, reported, local, method=shown, num_rows=config.contact_sheet_rows)
        for path in sorted(Path(local).rglob("*")):
            if path.is_file():
                files.write_bytes(folder.path(*path.relative_to(local).parts), path.read_bytes())
        folder.commit({"name": name, "adapter": adapter})

        def record() -> None:
            for outcome in outcomes:
                about = {"encoder": outcome.variant.label, "model": outcome.variant.model,
                         "adapter": outcome.variant.adapter or NONE}  # fmt: skip
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
    if len(outcomes) == 2:
        say(comparison_line(outcomes, reported, shown))
    chosen_on = "the same queries, so it is optimistic" if selected is reported else f"split {selected.split!r}"
    say(f"alpha chosen on {chosen_on}. {SCENES_NOTE if reported.name == 'scenes' else ''}")
    say(f"results: {folder.uri}\nMLflow: {parent.page}")


if __name__ == "__main__":
    run(main)
