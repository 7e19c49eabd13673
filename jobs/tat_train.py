"""Ray Train: Text-Anchored-Tuning of an image tower with LoRA (arXiv 2405.00571).

    ray job submit -- python jobs/tat_train.py                                # generated data, the small model: minutes
    ray job submit -- python jobs/tat_train.py --model ViT-L-14 --pretrained openai \\
        --data 's3://bucket/laion/{00000..00199}.tar' --num_workers 8 --use_gpu true \\
        --storage_path s3://bucket/runs --tracking_uri http://mlflow:5000     # the paper's settings are the defaults
    python jobs/tat_train.py --help                                           # every setting

The same command again resumes an interrupted run (same name, same settings) or says that it is finished.
Results: <storage_path>/tat_train/<name>/ with adapter/ (PEFT), merged/ (open_clip local-dir), rejects/, and MLflow.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jobs.config import JobConfig, parse_config, resolve_precision
from jobs.models import inspect_model
from jobs.session import connect, run
from jobs.start_up import StartUp

SMALL_MODEL = "scenes-tiny"
# For the small model and the generated pairs: enough steps to see the effect in two minutes on two cores.
_SMALL_BATCH, _PAPER_BATCH = 128, 1024
_SMALL_LR, _PAPER_LR = 3e-3, 1e-4


class TatTrainConfig(JobConfig):
    """Settings of a tuning run. Defaults are the paper's where it states them."""

    name: str = Field("", description="Run name, unique per logical run. Empty: made from the settings.")
    data: str = Field(
        "scenes",
        description="Image-text shards: a folder, file, glob or {000..099} range of .tar or .parquet at any URI; "
        "'scenes' generates them.",
    )
    num_pairs: PositiveInt = Field(16_000, description="Pairs to generate when data is 'scenes'.")
    model: str = Field(SMALL_MODEL, description="open_clip model name, hf-hub:..., local-dir:/path, or 'scenes-tiny'.")
    pretrained: str | None = Field(None, description="Weights tag of a named model, or a .safetensors file.")
    r: PositiveInt = Field(16, description="LoRA rank.")
    lora_alpha: PositiveFloat = Field(16.0, description="LoRA scale: updates are multiplied by lora_alpha / r.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="Dropout before the LoRA layers.")
    target_modules: Annotated[list[str], Field(min_length=1)] = Field(
        ["q_proj", "v_proj"],
        description="Layers of the image tower that get an adapter; one that matches nothing is an error.",
    )
    temperature: PositiveFloat = Field(0.07, description="Fixed temperature of the loss (logit scale 1 / temperature).")
    lr: Annotated[float, Field(ge=0)] = Field(
        0.0, description=f"Peak learning rate of AdamW. 0: {_PAPER_LR}, or {_SMALL_LR} for {SMALL_MODEL}."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="Weight decay of AdamW (unpublished).")
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="Share of the steps with a linearly rising rate, before a cosine to zero (unpublished)."
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Gradient clipping, 0 = off (unpublished).")
    epochs: PositiveInt = Field(1, description="Passes over the data.")
    global_batch_size: Annotated[int, Field(ge=0)] = Field(
        0, description=f"Samples per step over all workers. 0: {_PAPER_BATCH}, or {_SMALL_BATCH} for {SMALL_MODEL}."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 autocast on CUDA, fp32 on CPU.")
    cache_text_anchors: bool = Field(
        False,
        description="Embed all captions once, before training, and read these anchors with the images: the text tower does "
        "not run in training, and other runs over the same shards use the anchors again. Same losses to 1e-5 in fp32.",
    )
    micro_batch_size: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Samples of a worker whose activations are held at once (gradient caching, arXiv 2101.06983): the same "
        "gradients of the whole global batch, to rounding, in the memory of this many samples, for a second forward pass. "
        "0: all of the worker's.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, about a third slower.")
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="CHANGES THE METHOD: share of an image's patches left out in training (arXiv 2212.00794), for less work "
        "per step; the paper's Text-Anchored-Tuning has none. Scoring always sees all patches.",
    )
    seed: int = Field(0, description="Seeds the shuffle, the adapter's start, dropout and patch dropout.")
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1, description="Training workers, or [min, max] to shrink and grow with the cluster."
    )
    use_gpu: bool = Field(False, description="One GPU per worker.")
    cpus_per_worker: PositiveFloat = Field(
        0.5, description="Logical CPUs a training worker holds; what is left of the cluster reads and decodes."
    )
    checkpoint_every_steps: PositiveInt = Field(
        50, description="Steps between checkpoints; at most these are done twice."
    )
    log_every_steps: PositiveInt = Field(10, description="Steps between progress lines and MLflow points.")
    gap_samples: PositiveInt = Field(1024, description="Pairs on which the modality gap is measured before and after.")
    max_failures: Annotated[int, Field(ge=-1)] = Field(
        8, description="Worker failures survived before the run fails; -1 = any number."
    )
    record_samples: bool = Field(False, description="Keep (step, shard, key) of every sample seen, for audits.")

    @model_validator(mode="after")
    def _workers_in_order(self) -> TatTrainConfig:
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"num_workers {list(self.num_workers)} must be [min, max] with min <= max")
        return self

    @property
    def batch(self) -> int:
        """Global batch size with the default filled in."""
        return self.global_batch_size or (_SMALL_BATCH if self.model == SMALL_MODEL else _PAPER_BATCH)

    @property
    def peak_lr(self) -> float:
        """Learning rate with the default filled in."""
        return self.lr or (_SMALL_LR if self.model == SMALL_MODEL else _PAPER_LR)

    @property
    def resolved_precision(self) -> str:
        """Precision with "auto" decided: "fp32" or "bf16"."""
        return resolve_precision(self.precision, use_gpu=self.use_gpu)

    @property
    def lora(self) -> dict[str, Any]:
        """What `attach_lora` takes."""
        return self.model_dump(include={"r", "lora_alpha", "lora_dropout", "target_modules"})

    @property
    def min_workers(self) -> int:
        """Workers that must fit for the run to start."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers


def main() -> None:
    """Read the settings and have a worker check the model while this process imports what training needs."""
    config = parse_config(TatTrainConfig, "tat_train", __doc__.split("\n")[0])
    start_up = StartUp()
    start_up.reached("first imports")
    connect()
    start_up.reached("connection")
    given = {"lora": config.lora, "patch_dropout": config.patch_dropout}
    checking = inspect_model.remote(config.model, config.pretrained, **given)
    from jobs.training_job import tune

    start_up.reached("imports")
    tune(config, checking, start_up)


if __name__ == "__main__":
    run(main)
