"""The driver of an embedding run: check, plan, embed, record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray
from rich.console import Console
from rich.table import Table

from cir_core import files
from jobs import tracking
from jobs.config import flat_parameters, public
from jobs.decoding import embedding_resources
from jobs.embedder import EmbedPlan
from jobs.embedding import check_shard_names, embed_stores, find_units, store_spec, store_uri
from jobs.models import ModelInfo
from jobs.session import check_resources, code_version, say
from jobs.storage import CHECK_S, absolute, check_writable

if TYPE_CHECKING:
    from jobs.embed import EmbedConfig


def embed(config: EmbedConfig, checking: ray.ObjectRef[ModelInfo]) -> None:
    """Check everything, then embed, then record the run. checking: the model, as `inspect_model` will describe it."""
    uri = tracking.resolve_uri(config.tracking_uri)
    tracking.check_server(uri)
    with files.patience(CHECK_S):
        units, input_digest = find_units(config.data, captions=config.captions != "no")
    spec = store_spec(
        ray.get(checking).details,
        dtype=config.dtype,
        captions=config.captions,
        input_digest=input_digest,
        ids=config.ids,
    )
    output = absolute(config.output) if config.output else store_uri(config.storage_path, spec)
    check_writable(output, "output")
    if config.ids == "shard":
        check_shard_names(units)
    check_resources(embedding_resources(config.num_encoders, use_gpu=config.use_gpu))
    tracker = tracking.Tracker.start(
        uri,
        experiment=config.experiment,
        name=f"embed-{spec.identity[:8]}",
        parameters=flat_parameters(config) | {"store": output, "store_identity": spec.identity},
        tags={"job": "embed", "code_version": code_version()},
    )
    say(f"MLflow: {tracker.page}")
    plan = EmbedPlan(
        units=tuple(units),
        output=output,
        spec=spec,
        **config.model_dump(
            include={
                "model",
                "pretrained",
                "adapter",
                "preprocessing_mode",
                "captions",
                "batch_size",
                "use_gpu",
                "ids",
                "decode",
                "unreadable_shards",
                "encoder_threads",
            }
        ),
    )
    try:
        limit = None if config.max_rejects < 0 else config.max_rejects
        (store,) = embed_stores(
            [plan],
            num_encoders=config.num_encoders,
            max_rejects=limit,
            max_reject_share=config.max_reject_share,
            tracker=tracker,
        )
    except BaseException:
        tracking.publish(lambda: tracker.finish("FAILED"), patience_s=5)
        raise
    rejects = store.manifest.num_rejects

    def record() -> None:
        tracker.log_metrics({"rows": store.num_rows, "rejects": rejects})
        tracker.finish()

    tracking.publish(record)
    table = Table(title="embed", show_header=False)
    for row in (
        ("store", public(output)),
        ("rows", str(store.num_rows)),
        ("rejects", str(rejects)),
        ("MLflow", tracker.page),
    ):
        table.add_row(*row)
    Console(width=140).print(table)
