"""Adapters on disk: a standard PEFT folder (adapter_config.json, adapter_model.safetensors) plus tat.json.

tat.json says what the adapter was tuned from and how, so that it is never put on another model. Only JSON and
safetensors are read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cir_core import files
from cir_core.lora.attach import TwoTowerModel, has_adapter, wrap_tower
from cir_core.lora.attention import fuse_attention
from cir_core.schema import CirError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

TAT_NAME = "tat.json"
CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"  # PEFT's own names
# The settings of adapter_config.json that are honoured. PEFT has dozens more: some import the module they
# name (megatron_core), some rewrite the base weights while loading (PiSSA, OLoRA). They are refused unless at
# their default.
_SETTINGS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "use_rslora",
)
# Settings of adapter_config.json that change no output: where it came from and which PEFT wrote it.
_UNSTABLE_SETTINGS = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")


@dataclass(frozen=True, kw_only=True)
class TatMetadata:
    """tat.json: what an adapter was tuned from, on what and how.

    base_model, pretrained: as given to `load_encoder`; weights_digest: of the base model, before any adapter.
    quick_gelu: the base model's activation, which its weights do not tell; None = unknown, then it is not
    checked.
    loss: the settings of the loss (temperature, ...); extra: anything else worth keeping (run id, metrics).
    """

    base_model: str
    weights_digest: str
    pretrained: str | None = None
    quick_gelu: bool | None = None
    data: str = ""
    steps: int = 0
    loss: Mapping[str, Any] = field(default_factory=dict)
    code_version: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> TatMetadata:
        """Read `folder`/tat.json. Raises CirError when it is missing or lacks a required field."""
        content = _read_json(Path(folder) / TAT_NAME)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(content) - known):
            raise CirError(f"{folder}/{TAT_NAME}: unknown keys {unknown}; known keys are {', '.join(sorted(known))}")
        try:
            return cls(**content)
        except TypeError as error:
            raise CirError(f"{folder}/{TAT_NAME}: {error}") from None


def save_adapter(model: TwoTowerModel, folder: str | Path, tat: TatMetadata, *, overwrite: bool = False) -> str:
    """Write the adapter of `model` as a PEFT folder with tat.json; returns its digest.

    All files are written beside `folder` and renamed into place at once. An existing folder is an error
    unless `overwrite`; then it is replaced. The same adapter always gives the same bytes.
    """
    if not has_adapter(model):
        raise CirError("there is no adapter to save: call attach_lora or load_adapter first")
    with folder_transaction(folder, overwrite=overwrite) as temporary:
        model.visual.peft_config["default"].base_model_name_or_path = tat.base_model
        # "auto" would ask the hub for the base model's vocabulary; an image tower has none.
        model.visual.save_pretrained(str(temporary), save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty model-card form
        config = _read_json(temporary / CONFIG_NAME)
        # target_modules is a set in PEFT: unsorted, its order changes with the hash seed of the process.
        config = {key: sorted(v) if isinstance(v, list) else v for key, v in sorted(config.items())}
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        (temporary / TAT_NAME).write_text(json.dumps(asdict(tat), indent=2, sort_keys=True) + "\n")
        return adapter_digest(temporary)


def load_adapter(
    model: TwoTowerModel,
    folder: str | Path,
    *,
    base_model: str,
    expected_weights_digest: str,
    quick_gelu: bool | None = None,
    trainable: bool = False,
) -> str:
    """Attach the adapter in `folder` (a path or a URI) to `model`, in place; returns its digest.

    base_model and expected_weights_digest describe `model` before the adapter (`weights_digest(model)`); an
    adapter tuned from other weights or another activation is refused by name. trainable: continue tuning;
    else all is frozen.
    Raises CirError for that, for missing files, for an adapter kept as a pickle, for one that is not LoRA,
    and for tensors that do not fit this tower. A refused adapter leaves the model as it was.
    """
    with local_adapter(folder) as path:
        tat = TatMetadata.read(path)
        _check_base(path, tat, base_model, expected_weights_digest, quick_gelu)
        config, tensors = _read_adapter(path)
        config.inference_mode = not trainable
        wrap_tower(model, config, sorted(config.target_modules))
        try:
            _fill(model.visual, tensors, path)
        except CirError:
            model.visual = model.visual.unload()
            fuse_attention(model.visual)
            raise
        return adapter_digest(path)


def adapter_digest(folder: str | Path) -> str:
    """'sha256:...' over an adapter's tensors and the settings that change its output; not PEFT's version."""
    folder = Path(folder)
    config = _read_json(folder / CONFIG_NAME)
    settings = {
        key: sorted(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key not in _UNSTABLE_SETTINGS and value not in (None, {}, [], False)
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(_adapter_weights(folder).read_bytes())
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def local_adapter(folder: str | Path) -> Iterator[Path]:
    """The adapter's folder on this machine: itself when local, else a copy for as long as the block."""
    uri = str(folder)
    if files.is_local(uri):
        yield files.local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="adapter-") as temporary:
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, TAT_NAME):
            (Path(temporary) / name).write_bytes(files.read_bytes(files.join(uri, name)))
        yield Path(temporary)


@contextmanager
def folder_transaction(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder`: renamed to it when the block ends well, else removed."""
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise CirError(f"{folder} already exists: choose another folder, or pass overwrite=True to replace it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        content = temporary / "content"  # made with the user's own mode bits; mkdtemp's are private
        content.mkdir()
        yield content
        if folder.exists():
            folder.rename(temporary / "replaced")
        content.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_base(
    path: Path, tat: TatMetadata, base_model: str, expected_weights_digest: str, quick_gelu: bool | None
) -> None:
    if tat.weights_digest != expected_weights_digest:
        raise CirError(
            f"adapter {path} was tuned from {tat.base_model!r} (pretrained={tat.pretrained!r}, weights "
            f"{tat.weights_digest[:19]}), not from {base_model!r} (weights {expected_weights_digest[:19]}): "
            "load that model, or choose an adapter of this one"
        )
    if quick_gelu is not None and tat.quick_gelu is not None and quick_gelu != tat.quick_gelu:
        raise CirError(
            f"adapter {path} was tuned from {tat.base_model!r} with quick_gelu={tat.quick_gelu}, but "
            f"{base_model!r} is loaded with quick_gelu={quick_gelu}: the same weights, another function; "
            "load it the same way"
        )


def _adapter_weights(folder: Path) -> Path:
    weights: Path = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        found = f"only {', '.join(pickles)}, a pickle, which is never loaded" if pickles else "no weights"
        raise CirError(
            f"adapter {folder}: expected {SAFETENSORS_WEIGHTS_NAME}, found {found}; save it again with safetensors"
        )
    return weights


def _read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    from peft import LoraConfig  # here: a fifth of a process's start, spent only where there is an adapter

    content = _read_json(folder / CONFIG_NAME)
    name = f"adapter {folder}"
    if content.get("peft_type") != "LORA":
        raise CirError(f"{name}: peft_type is {content.get('peft_type')!r}; only LORA adapters are supported")
    default = LoraConfig().to_dict()
    for key, value in content.items():
        ignored = key in _SETTINGS or key in _UNSTABLE_SETTINGS or key in ("peft_type", "task_type")
        if not ignored and value and value != default.get(key):
            raise CirError(
                f"{name}: the setting {key}={value!r} is not supported; merge it, or convert it to plain LoRA"
            )
    if not isinstance(content.get("target_modules"), list):
        raise CirError(f"{name}: target_modules must be a list of layer names, not {content.get('target_modules')!r}")
    weights = _adapter_weights(folder)
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise CirError(f"{weights} is not a readable safetensors file ({error}); copy or save it again") from None
    try:
        return LoraConfig(**{key: content[key] for key in _SETTINGS if key in content}), tensors
    except (TypeError, ValueError) as error:
        raise CirError(f"{name}: {CONFIG_NAME} does not describe a LoRA adapter ({error})") from None


def _fill(tower: PeftModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Load the tensors once names and shapes agree; PEFT only warns about an adapter with holes."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(tower, save_embedding_layers=False)
    wrong = sorted(set(expected) ^ set(tensors)) or sorted(
        name for name, tensor in tensors.items() if tensor.shape != expected[name].shape
    )
    if wrong:
        raise CirError(
            f"adapter {folder} does not fit this image tower: {len(wrong)} tensors are missing, unknown or "
            f"of another shape, first {wrong[0]!r}; load the model it was tuned from"
        )
    set_peft_model_state_dict(tower, tensors)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CirError(
            f"{path.parent} is not an adapter folder: expected {CONFIG_NAME}, "
            f"{SAFETENSORS_WEIGHTS_NAME} and {TAT_NAME}, {path.name} is missing"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CirError(f"{path} is not valid JSON ({error}); copy or save the adapter again") from None
    if not isinstance(content, dict):
        raise CirError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
