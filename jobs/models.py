"""Models as a driver sees them: a Ray worker loads and checks them, and says what they are.

Importing torch, open_clip and peft takes several times as long as the rest of a driver's start. A worker does it while
the driver goes on, and Ray gives its process, with the imports done, to the job's next task or actor that needs them.
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
    preprocessing_mode: str | None = None,
    lora: dict[str, Any] | None = None,
) -> ModelInfo:
    """Load a model as `load_encoder` does; with `lora`, attach a new adapter to this copy.

    Raises:
        CirError: any mistake in the arguments.
    """
    encoder = load_encoder(model, pretrained, adapter, "cpu", preprocessing_mode=preprocessing_mode)
    if lora is not None:
        from cir_core.lora import attach_lora  # imports torch, as load_encoder does

        attach_lora(encoder.model, **lora)
    return ModelInfo(model, pretrained, adapter, encoder.details, encoder.preprocessing)


class VariantInspector:
    """An actor: loads a base model and, with an adapter, the tuned one; keeps the base model to encode captions with.

    model, pretrained: "" and None where the adapter says what it was made from. The rest is as in `load_encoder`.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None,
        adapter: str | None,
        device: str,
        precision: str,
        preprocessing_mode: str | None,
    ) -> None:
        self.model, self.pretrained, self.adapter = model, pretrained, adapter
        self.device, self.precision, self.preprocessing_mode = device, precision, preprocessing_mode

    def inspect(self) -> list[ModelInfo]:
        """Return the one or two models.

        Raises:
            CirError: any mistake in the arguments.
        """
        if self.adapter is not None:
            from cir_core.lora import TatMetadata, local_adapter

            with local_adapter(self.adapter) as folder:
                tat = TatMetadata.read(folder)
            self.model, self.pretrained = self.model or tat.base_model, self.pretrained or tat.pretrained
        found = []
        for adapter in [None] if self.adapter is None else [None, self.adapter]:
            encoder = load_encoder(
                self.model,
                self.pretrained,
                adapter,
                self.device,
                self.precision,
                preprocessing_mode=self.preprocessing_mode,
            )
            if adapter is None:
                self.base = encoder
            found.append(ModelInfo(self.model, self.pretrained, adapter, encoder.details, encoder.preprocessing))
        return found

    def encode_captions(self, lists: list[list[str]]) -> tuple[list[Tensor], list[int]]:
        """Encode relative captions with the text tower, which no adapter touches; also count those it cuts short.

        Returns:
            Per list, float32[n, D] on the CPU and the number of captions that lose their end.
        """
        unique = list(dict.fromkeys(caption for captions in lists for caption in captions))
        places = {caption: place for place, caption in enumerate(unique)}
        texts = self.base.encode_texts(unique).cpu()
        rows = [[places[caption] for caption in captions] for captions in lists]
        return [texts[chosen] for chosen in rows], [self.base.count_truncated(captions) for captions in lists]
