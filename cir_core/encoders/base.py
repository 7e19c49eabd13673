"""What every encoder offers, and the facts about one that a manifest keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from cir_core.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EncoderDetails:
    """Everything that decides an encoder's output. Digests are 'sha256:...'.

    model, pretrained: as `load_encoder` understood them (aliases kept, tags cleaned).
    weights_digest: the base model's state dict, before the adapter. tokenizer_digest: vocabulary and rules.
    config_digest: the architecture (heads, activation, ...), which tensors do not tell.
    preprocessing_tag: size, mode and interpolation, plus the mean and standard deviation of the
    normalisation.
    precision: the one in use, "fp32" or "bf16", never "auto". context_length: tokens a text may have.
    """

    model: str
    pretrained: str | None
    weights_digest: str
    adapter_digest: str | None
    config_digest: str
    tokenizer_digest: str
    preprocessing_tag: str
    dim: int
    precision: str
    quick_gelu: bool
    context_length: int

    @property
    def identity(self) -> str:
        """One line that is equal exactly when the same pictures and texts should get the same embeddings.

        Independent of machine, folder and device. Precision is left out: the same model on CPU (fp32) and GPU
        (bf16) is one model, and either may search a store of the other. What is stored knows it: `StoreSpec.precision`.
        """
        parts = {
            "weights": _short(self.weights_digest),
            "adapter": _short(self.adapter_digest),
            "config": _short(self.config_digest),
            "tokenizer": _short(self.tokenizer_digest),
            "preprocessing": self.preprocessing_tag,
        }
        name = self.model
        if name.startswith("local-dir:"):
            name = "local-dir:" + name.rstrip("/").rpartition("/")[2].removeprefix("local-dir:")
        return " ".join([f"{name}@{self.pretrained or 'own'}", *(f"{key}={value}" for key, value in parts.items())])


@runtime_checkable
class Encoder(Protocol):
    """Two towers, one space: images and texts to unit vectors whose dot product is their similarity."""

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""

    @property
    def identity(self) -> str:
        """Changes with model, weights, adapter and preprocessing; see EncoderDetails.identity."""

    @property
    def details(self) -> EncoderDetails:
        """The facts behind the identity, for manifests."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes the uint8 tensor that `encode_images` takes."""

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8[B, 3, H, W], already resized and cropped -> float32[B, D], unit norm."""

    def encode_texts(self, texts: list[str]) -> Tensor:
        """B texts -> float32[B, D], unit norm. Empty texts are valid; over-long ones lose their end."""

    def count_truncated(self, texts: list[str]) -> int:
        """How many of these texts are too long for the model and lose their end in `encode_texts`."""


def _short(digest: str | None) -> str:
    """16 hex digits, enough to tell models apart and short enough to read."""
    return digest.removeprefix("sha256:")[:16] if digest else "none"
