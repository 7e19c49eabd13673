"""Ray: sharded composed retrieval and evaluation, before and after an adapter, all methods and alphas side by side.

    ray job submit -- python jobs/batch_retrieve.py                        # scenes, newest finished tat_train run
    ray job submit -- python jobs/batch_retrieve.py --adapter none --alphas '[0.5, 0.8]' --methods '[slerp, sum]'
    ray job submit -- python jobs/batch_retrieve.py --benchmark cirr --root data/CIRR --alpha 0.9
    ray job submit -- python jobs/batch_retrieve.py --benchmark cirr --root data/CIRR --split test1 --alpha 0.9  # server's files
    ray job submit -- python jobs/batch_retrieve.py --benchmark fashioniq --root data/fashionIQ_dataset --alpha 0.8 \
        --protocol '{"category": ["dress", "shirt"], "gallery": ["original", "val"]}'   # a list runs each of its values
    ray job submit -- python jobs/batch_retrieve.py --benchmark custom --queries s3://b/queries/ --gallery s3://b/store
    ray job submit -- python jobs/batch_retrieve.py --benchmark custom ... --approximate ivf --nprobe 64  # recall is reported
    python jobs/batch_retrieve.py --help                                   # every setting

The gallery's embedding stores are made if absent and reused by identity. alpha is given, or chosen on one split and
reported on another. Results: <storage_path>/batch_retrieve/<name>/ and MLflow: a parent run with a child per encoder,
category and method. `custom` answers people's own queries from any store, part by part: see jobs/catalogue.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

import ray
from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from cir_core.benchmarks import protocol_options
from cir_core.schema import CirError
from jobs.config import JobConfig, parse_config
from jobs.decoding import embedding_resources
from jobs.models import import_models, inspect_variants
from jobs.session import check_resources, connect, run, say
from jobs.start_up import StartUp

Method = Literal["image_only", "text_only", "sum", "nlerp", "slerp", "score_fusion"]
NEWEST, NONE = "newest", "none"
_FOR_CATALOGUES = (
    "queries", "gallery", "queries_per_part", "max_rejects", "gallery_images", "approximate", "nlist", "train_rows",
    "nprobe", "hnsw_m", "ef_construction", "ef_search", "recall_queries",
)  # fmt: skip


class BatchRetrieveConfig(JobConfig):
    """Settings of a retrieval run."""

    name: str = Field("", description="Run name. Empty: made from the settings.")
    benchmark: str = Field(
        "scenes", description="cirr, circo, fashioniq, genecis, domain_conversion, scenes, or custom."
    )
    root: str = Field("", description="The benchmark's folder. Empty with 'scenes': generated under storage_path.")
    split: str = Field(
        "",
        description="Split that is reported; one without public answers gets files for its test server. Empty: val; test for 'scenes'.",
    )
    select_split: str = Field(
        "val", description="Split on which alpha is chosen, unless --alpha says it; empty: the reported split itself."
    )
    num_queries: PositiveInt = Field(
        300, description="Queries per split to generate for 'scenes'; eleven pictures each."
    )
    seed: int = Field(0, description="Seed of the generated benchmark and of the bootstrap.")
    protocol: dict[str, Any] = Field(
        {},
        description='Protocol options of the benchmark, e.g. \'{"reference": "kept"}\'. An option that is a list runs each of its '
        "values; FashionIQ's categories and GeneCIS's tasks all run by default, and are averaged.",
    )
    gallery_ids: str = Field(
        "", description="File of image ids, a JSON list or one a line, searched instead of the benchmark's own gallery."
    )
    gallery_alpha: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Above 0, gallery images that have a caption are composed with it: slerp at this alpha.",
    )
    gallery_captions: str = Field(
        "", description="JSON Lines or Parquet file (id, caption) of captions for a gallery of single picture files."
    )
    missing_images: Literal["error", "skip"] = Field(
        "error",
        description="error: a missing or unreadable picture stops the run; skip: it is left out with the queries that "
        "need it, counted and printed with every score.",
    )
    queries: str = Field(
        "",
        description="With 'custom': queries in JSON Lines or Parquet (query_id, reference = gallery id or picture URI, "
        "relative_caption, optional target_ids, subset_ids): a file, folder, glob or URI.",
    )
    gallery: str = Field("", description="With 'custom': the embedding store that is searched, committed.")
    queries_per_part: PositiveInt = Field(4096, description="With 'custom': queries of one result file.")
    max_rejects: int = Field(
        0, ge=-1, description="With 'custom': queries whose reference picture cannot be used; -1 allows any number."
    )
    gallery_images: str = Field(
        "",
        description="With 'custom': the shards or image folder the store was made of, for the contact sheet's pictures.",
    )
    model: str = Field("", description="Model; empty: the adapter's base model, or 'scenes-tiny' without an adapter.")
    pretrained: str | None = Field(None, description="Weights tag of a named model, or a .safetensors file.")
    adapter: str = Field(
        NEWEST,
        description="PEFT adapter folder or URI; 'newest': of the newest finished tat_train run of the experiment; "
        "'none': the base model alone.",
    )
    preprocessing_mode: Literal["center_crop", "target_pad", "squash"] | None = Field(
        None, description="How a picture becomes a square; empty: as the model says, center_crop for CLIP."
    )
    methods: list[Method] = Field([], description="Composition methods; empty: all of them, or slerp with 'custom'.")
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="alpha to report, such as the paper's (CIRR 0.9, CIRCO and FashionIQ 0.8); empty: chosen.",
    )
    alphas: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [],
        description="Text weights of the sweep; 0 image only, 1 text only. Empty: 0, 0.1, ..., 1, or --alpha with 'custom'.",
    )
    k: PositiveInt = Field(60, description="Length of the rankings; at least the benchmark's deepest metric.")
    num_shards: PositiveInt = Field(2, description="Tasks that share the gallery; the result does not depend on it.")
    search_memory_gb: PositiveFloat = Field(
        4.0,
        description="What each of them may hold of the gallery; a larger share is streamed from storage for every tile.",
    )
    approximate: Literal["ivf", "hnsw"] | None = Field(
        None,
        description="With 'custom': search a FAISS index of each shard instead of every image. Its recall against exact search "
        "is measured and reported in every run. Needs pip install 'slerp-tat[ann]'.",
    )
    nlist: PositiveInt | None = Field(
        None, description="ivf: inverted lists of a shard; empty: 4 sqrt(rows), at least 39 rows a list."
    )
    train_rows: PositiveInt | None = Field(
        None, description="ivf: rows of a shard that k-means sees; empty: 64 a list, at most all."
    )
    nprobe: PositiveInt | None = Field(
        None, description="ivf: lists a query looks into; nlist of them: exact. Empty: an eighth, at least 16."
    )
    hnsw_m: PositiveInt | None = Field(
        None, description="hnsw: links of an image, doubled on the ground level; empty: 32."
    )
    ef_construction: PositiveInt | None = Field(
        None, description="hnsw: candidates held while an image is linked; empty: 200."
    )
    ef_search: PositiveInt | None = Field(
        None, description="hnsw: candidates held while a query walks the graph; empty: the larger of 128 and 2 k."
    )
    recall_queries: int = Field(
        200, ge=1, le=10_000, description="With --approximate: queries, drawn by --seed, that exact search answers too."
    )
    batch_size: PositiveInt = Field(256, description="Images per encoder call.")
    num_encoders: PositiveInt = Field(1, description="Actors that embed a missing gallery.")
    use_gpu: bool = Field(False, description="One GPU per encoder.")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 autocast on CUDA, fp32 on CPU.")
    contact_sheet_rows: PositiveInt = Field(40, description="Queries shown with pictures.")

    @field_validator("methods", "alphas")
    @classmethod
    def _each_once(cls, values: list[Any], info: ValidationInfo) -> list[Any]:
        if len(set(values)) != len(values):
            raise ValueError(f"{info.field_name} must hold no value twice")
        return values

    @property
    def reported_split(self) -> str:
        """The split, or the benchmark's usual one."""
        return self.split or ("test" if self.benchmark == "scenes" else "val")

    @property
    def device(self) -> str:
        """Where encoders run."""
        return "cuda" if self.use_gpu else "cpu"

    @property
    def sweep(self) -> list[float]:
        """Every alpha of the sweep, the one to report among them."""
        alphas = self.alphas or [round(0.1 * step, 1) for step in range(11)]
        return sorted({*alphas, *([] if self.alpha is None else [self.alpha])})

    @property
    def compared(self) -> list[Method]:
        """The composition methods."""
        return self.methods or list(get_args(Method))

    def refuse(self, names: Iterable[str], where: str) -> None:
        """Raise CirError if one of these settings is given, since it does nothing there."""
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise CirError(f"--{name} does nothing {where}; leave it out")


def find_adapter(config: BatchRetrieveConfig) -> tuple[str | None, dict[str, str] | None]:
    """Return the adapter's URI (None: base model alone) and the tat_train run it comes from, if known."""
    from jobs import tracking  # imports mlflow

    uri = tracking.resolve_uri(config.tracking_uri)
    tracking.check_server(uri)
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


def main() -> None:
    """Read the settings and have a worker check the models while this process imports what retrieval needs."""
    config = parse_config(BatchRetrieveConfig, "batch_retrieve", __doc__.split("\n")[0])
    protocol_options(config.benchmark)  # an unknown benchmark is an error that lists the known ones
    if config.benchmark == "custom":
        from jobs.catalogue_job import answer_queries

        answer_queries(config)
        return
    config.refuse(_FOR_CATALOGUES, f"with --benchmark {config.benchmark}")
    start_up = StartUp()
    start_up.reached("first imports")
    connect()
    imported = import_models.remote()
    check_resources(embedding_resources(config.num_encoders, use_gpu=config.use_gpu))
    start_up.reached("connection")
    adapter, source = find_adapter(config)
    if source:
        say(f"adapter of tat_train run {source['name']} ({source['run_id']}): {adapter}")
    start_up.reached("tracking server")
    checking = inspect_variants.options(num_gpus=1 if config.use_gpu else 0).remote(
        config.model or ("scenes-tiny" if adapter is None else ""),
        config.pretrained,
        adapter,
        config.device,
        config.precision,
        config.preprocessing_mode,
        imported,
    )
    from jobs.retrieval_job import retrieve_and_report

    start_up.reached("imports")
    models = ray.get(checking)
    start_up.reached("models checked")
    retrieve_and_report(config, models, (source or {}).get("name", ""), start_up)


if __name__ == "__main__":
    run(main)
