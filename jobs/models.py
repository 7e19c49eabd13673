"""Models as a driver sees them: a Ray worker loads and checks them, and says what they are.

Importing torch and open_clip takes several times as long as the rest of a driver's start. A worker does it while the
driver goes on, and Ray gives its process, with the imports done, to the job's next task; an actor gets a new process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from cir_core.encoders import EncoderDetails, load_encoder
from cir_core.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelInfo:
    """A model that was loaded without complaint: what `load_encoder` was told, and what a driver must know of it."""

    model: str
    pretrained: str | None
    adapter: str | None
    details: EncoderDetails
    preprocessing: Preprocessing


@ray.remote(num_cpus=0)
def inspect_model(
    model: str,
    pretrained: str | None,
    adapter: str | None = None,
    *,
    precision: str = "auto",
    preprocessing_mode: str | None = None,
    decode: str = "exact",
    lora: dict[str, Any] | None = None,
    patch_dropout: float = 0.0,
) -> ModelInfo:
    """Load a model on the CPU as `load_encoder` does; with `lora`, check that it can get such an adapter and patch dropout.

    Raises:
        CirError: any mistake in the arguments.
    """
    encoder = load_encoder(
        model, pretrained, adapter, "cpu", precision, preprocessing_mode=preprocessing_mode, decode=decode
    )
    if lora is not None:
        from cir_core.lora import check_lora  # imports torch, as load_encoder does
        from cir_core.tuning.image_tower import set_patch_dropout

        check_lora(encoder.model, **lora)
        set_patch_dropout(encoder.model.visual, patch_dropout)
    return ModelInfo(model, pretrained, adapter, encoder.details, encoder.preprocessing)


@ray.remote(num_cpus=0)
def import_models() -> None:
    """Import what loading a model needs, before it is known which one; the next task finds it done."""
    import cir_core.encoders.open_clip_models  # noqa: F401


@ray.remote(num_cpus=0)
def inspect_variants(
    model: str,
    pretrained: str | None,
    adapter: str | None,
    device: str,
    precision: str,
    preprocessing_mode: str | None,
    imported: None = None,  # noqa: ARG001
) -> list[ModelInfo]:
    """Load a base model and, with an adapter, the tuned one.

    model, pretrained: "" and None where the adapter says what it was made from. imported: of `import_models`, whose
    process this is to run in. The rest is as in `load_encoder`.

    Raises:
        CirError: any mistake in the arguments.
    """
    if adapter is not None:
        from cir_core.lora import TatMetadata, local_adapter

        with local_adapter(adapter) as folder:
            tat = TatMetadata.read(folder)
        model, pretrained = model or tat.base_model, pretrained or tat.pretrained
    found = []
    for one in [None] if adapter is None else [None, adapter]:
        encoder = load_encoder(model, pretrained, one, device, precision, preprocessing_mode=preprocessing_mode)
        found.append(ModelInfo(model, pretrained, one, encoder.details, encoder.preprocessing))
    return found


@ray.remote(num_cpus=0)
def encode_captions(
    info: ModelInfo, device: str, precision: str, lists: list[list[str]]
) -> tuple[list[Tensor], list[int]]:
    """Encode relative captions with the text tower, which no adapter touches; also count those it cuts short.

    Returns:
        Per list, float32[n, D] on the CPU and the number of captions that lose their end.
    """
    encoder = load_encoder(
        info.model, info.pretrained, None, device, precision, preprocessing_mode=info.preprocessing.mode
    )
    unique = list(dict.fromkeys(caption for captions in lists for caption in captions))
    places = {caption: place for place, caption in enumerate(unique)}
    texts = encoder.encode_texts(unique).cpu()
    rows = [[places[caption] for caption in captions] for captions in lists]
    return [texts[chosen] for chosen in rows], [encoder.count_truncated(captions) for captions in lists]
