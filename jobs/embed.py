"""Ray Data: image-text shards, or a folder of images, to an embedding store.

    ray job submit -- python jobs/embed.py --data 's3://bucket/shards/{00000..00999}.tar' --output s3://bucket/store \\
        --model ViT-L-14 --pretrained openai --adapter s3://bucket/runs/tat_train/my-run/adapter --use_gpu true \\
        --num_encoders 8
    python jobs/embed.py --data my_pictures/ --output my_store            # the small model, on a laptop
    python jobs/embed.py --help                                           # every setting

The same command again continues an interrupted run and reuses a finished one. The store is Parquet: any reader opens it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt
from rich.console import Console
from rich.table import Table

from cir_core.encoders import load_encoder
from cir_core.schema import CirError
from jobs import tracking
from jobs.config import JobConfig, flat_parameters, parse_config
from jobs.embedding import DECODER_CPUS, EmbedPlan, embed_stores, find_units, store_spec
from jobs.session import check_resources, code_version, connect, run, say
from jobs.storage import absolute, check_writable


class EmbedConfig(JobConfig):
    """Settings of an embedding run."""

    data: str = Field(
        "",
        description="Shards (folder, file, glob or {000..099} range of .tar or .parquet) or a folder of images; any URI.",
    )
    output: str = Field("", description="URI of the store. Empty: <storage_path>/stores/<identity>.")
    model: str = Field(
        "scenes-tiny", description="open_clip model name, hf-hub:..., local-dir:/path, or 'scenes-tiny'."
    )
    pretrained: str | None = Field(None, description="Weights tag of a named model, or a .safetensors file.")
    adapter: str | None = Field(None, description="PEFT adapter folder or URI, as tat_train writes it.")
    captions: Literal["no", "text", "embed"] = Field("no", description="Keep captions as text, or embed them too.")
    batch_size: PositiveInt = Field(256, description="Images per encoder call.")
    num_encoders: PositiveInt = Field(1, description="Actors that hold the model.")
    use_gpu: bool = Field(False, description="One GPU per encoder.")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 autocast on CUDA, fp32 on CPU.")
    dtype: Literal["float32", "float16"] = Field("float32", description="Type of the stored embeddings.")
    preprocessing_mode: Literal["center_crop", "target_pad", "squash"] | None = Field(
        None, description="How a picture is brought to size; default: the model's own way."
    )
    max_rejects: int = Field(-1, description="Stop without committing above this many unreadable images; -1 = never.")


def main() -> None:
    """Check everything, then embed, then record the run."""
    config = parse_config(EmbedConfig, "embed", __doc__.split("\n")[0])
    if not config.data:
        raise CirError("--data is needed: the shards or the folder of images to embed")
    uri = tracking.resolve_uri(config.tracking_uri)
    tracking.check_server(uri)
    units, input_digest = find_units(config.data)
    encoder = load_encoder(
        config.model, config.pretrained, config.adapter, "cpu", preprocessing_mode=config.preprocessing_mode
    )
    spec = store_spec(encoder, dtype=config.dtype, captions=config.captions, input_digest=input_digest)
    output = absolute(config.output or f"{config.storage_path}/stores/{spec.identity[:16]}")
    check_writable(output, "output")
    connect()
    check_resources({"CPU": 0.5 + DECODER_CPUS} | ({"GPU": float(config.num_encoders)} if config.use_gpu else {}))
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
                "precision",
                "preprocessing_mode",
                "captions",
                "batch_size",
                "use_gpu",
            }
        ),
    )
    try:
        limit = None if config.max_rejects < 0 else config.max_rejects
        (store,) = embed_stores([plan], num_encoders=config.num_encoders, max_rejects=limit)
    except BaseException:
        tracking.publish(lambda: tracker.finish("FAILED"), patience_s=5)
        raise
    rejects = store.manifest.num_rejects

    def record() -> None:
        tracker.log_metrics({"rows": store.num_rows, "rejects": rejects})
        tracker.finish()

    tracking.publish(record)
    table = Table(title="embed", show_header=False)
    for row in (("store", output), ("rows", str(store.num_rows)), ("rejects", str(rejects)), ("MLflow", tracker.page)):
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    run(main)
