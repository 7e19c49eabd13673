"""Which encoder answers a catalogue's queries: the one that made its store, found and then checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cir_core.embedding_store import EmbeddingStore
from cir_core.schema import CirError
from jobs import tracking
from jobs.catalogue import EncoderChoice
from jobs.config import public
from jobs.models import ModelInfo
from jobs.session import say

if TYPE_CHECKING:
    from jobs.batch_retrieve import BatchRetrieveConfig


def choose_encoder(config: BatchRetrieveConfig, store: EmbeddingStore, tracking_uri: str) -> EncoderChoice:
    """Return the encoder that made the store, as far as its manifest and the settings tell; `check_encoder` checks it.

    Raises:
        CirError: the store was made with an adapter or a weights file that the settings do not name.
    """
    spec = store.manifest.spec
    pretrained = config.pretrained
    if pretrained is None and not config.model and spec.weights != "own":
        pretrained = spec.weights
        if pretrained.startswith("file:"):
            raise CirError(
                f"{public(store.uri)}: made with the weights file {pretrained[5:]!r}; give its path with --pretrained"
            )
    adapter = None if config.adapter in ("none", "newest") else config.adapter
    if spec.adapter_digest and config.adapter == "none":
        raise CirError(f"{public(store.uri)}: made with an adapter; name it with --adapter, 'none' does not fit")
    if spec.adapter_digest and adapter is None:
        newest = tracking.latest_finished(tracking_uri, config.experiment, "tat_train")
        if newest is None:
            raise CirError(f"{public(store.uri)}: made with an adapter; name its folder with --adapter")
        adapter = newest["adapter_uri"]
        say(f"the store was made with an adapter; trying that of the newest tat_train run {newest['name']}: {adapter}")
    return EncoderChoice(
        model=config.model or spec.model,
        pretrained=pretrained,
        adapter=adapter,
        precision=config.precision,
        preprocessing_mode=spec.preprocessing.partition("-")[0],
        decode="fast" if spec.preprocessing.partition("/")[0].endswith("-fast") else "exact",
        use_gpu=config.use_gpu,
        batch_size=config.batch_size,
    )


def check_encoder(store: EmbeddingStore, info: ModelInfo) -> None:
    """Raise CirError, naming the difference, unless this encoder made the store. A model's folder may have moved."""
    spec, details = store.manifest.spec, info.details
    here = {
        "model": details.model,
        "weights_digest": details.weights_digest,
        "adapter_digest": details.adapter_digest or "",
        "config_digest": details.config_digest,
        "tokenizer_digest": details.tokenizer_digest,
        "preprocessing": details.preprocessing_tag,
        "dim": details.dim,
    }
    if all(name.startswith("local-dir:") for name in (spec.model, details.model)):
        del here["model"]
    different = [f"{key}: {getattr(spec, key)!r} in the store, {mine!r} here" for key, mine in here.items()
                 if getattr(spec, key) != mine]  # fmt: skip
    if different:
        raise CirError(
            f"{public(store.uri)} was made by another encoder ({'; '.join(different)}); choose --model, --pretrained and "
            "--adapter as the store was made, or embed the gallery with this encoder"
        )
