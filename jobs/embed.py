"""Ray Data: image-text shards, or a folder of images, to an embedding store.

    ray job submit -- python jobs/embed.py --data 's3://bucket/shards/{00000..00999}.tar' --output s3://bucket/store \\
        --model ViT-L-14 --pretrained openai --adapter s3://bucket/runs/tat_train/my-run/adapter --use_gpu true \\
        --num_encoders 8
    python jobs/embed.py --data my_pictures/ --output my_store            # the small model, on a laptop
    python jobs/embed.py --help                                           # every setting

The same command again continues an interrupted run and reuses a finished one. The store is Parquet: any reader opens it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from cir_core.schema import CirError
from jobs.config import JobConfig, parse_config, resolve_precision
from jobs.models import inspect_model
from jobs.session import connect, run


class EmbedConfig(JobConfig):
    """Settings of an embedding run."""

    data: str = Field(
        "",
        description="Shards (folder, file, glob or {000..099} range of .tar or .parquet, or a .txt that lists such), a "
        ".csv or .parquet with a column of image URIs, or a folder of images; any URI.",
    )
    output: str = Field("", description="URI of the store. Empty: <storage_path>/stores/<identity>.")
    model: str = Field(
        "scenes-tiny", description="open_clip model name, hf-hub:..., local-dir:/path, or 'scenes-tiny'."
    )
    pretrained: str | None = Field(None, description="Weights tag of a named model, or a .safetensors file.")
    adapter: str | None = Field(None, description="PEFT adapter folder or URI, as tat_train writes it.")
    ids: Literal["key", "shard"] = Field(
        "key", description="Ids of the store: the key of a sample, or <shard name>/<key> where every shard counts anew."
    )
    captions: Literal["no", "text", "embed"] = Field("no", description="Keep captions as text, or embed them too.")
    batch_size: PositiveInt = Field(256, description="Images per encoder call.")
    num_encoders: PositiveInt = Field(1, description="Actors that hold the model.")
    encoder_threads: Annotated[int, Field(ge=0)] = Field(
        0, description="Threads of an encoder on the CPU; 0: the CPUs of its node. The result is the same."
    )
    use_gpu: bool = Field(False, description="One GPU per encoder.")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 autocast on CUDA, fp32 on CPU.")
    dtype: Literal["float32", "float16"] = Field("float32", description="Type of the stored embeddings.")
    preprocessing_mode: Literal["center_crop", "target_pad", "squash"] | None = Field(
        None, description="How a picture is brought to size; default: the model's own way."
    )
    decode: Literal["exact", "fast"] = Field(
        "exact",
        description="exact: the pixels that open_clip sees. fast: JPEGs of at least four times the model's size are decoded "
        "at reduced scale, two to six times as fast; levels (0 to 255) differ by less than 1 on average.",
    )
    unreadable_shards: Literal["stop", "reject"] = Field(
        "stop", description="A shard that is no shard at all: stop, or go on and list it as one reject."
    )
    max_rejects: Annotated[int, Field(ge=-1)] = Field(
        -1, description="Stop without committing above this many unusable images; -1 = any number."
    )
    max_reject_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Stop when a larger share of the images is unusable (from the first thousand on)."
    )


def main() -> None:
    """Read the settings and have a worker check the model while this process imports what embedding needs."""
    config = parse_config(EmbedConfig, "embed", __doc__.split("\n")[0])
    if not config.data:
        raise CirError("--data is needed: the shards or the folder of images to embed")
    connect()
    checking = inspect_model.remote(
        config.model,
        config.pretrained,
        config.adapter,
        precision=resolve_precision(config.precision, use_gpu=config.use_gpu),
        preprocessing_mode=config.preprocessing_mode,
        decode=config.decode,
    )
    from jobs.embedding_job import embed

    embed(config, checking)


if __name__ == "__main__":
    run(main)
