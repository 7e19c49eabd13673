"""From a model's name to files on this machine: which configuration, which weights. Nothing is loaded here.

A name is one of open_clip's architectures ("ViT-B-32", with the tag or the .safetensors file of its weights),
a hub repository ("hf-hub:org/name"), a folder ("local-dir:/path") or the project's own "scenes-tiny". Weights
come as safetensors or not at all: a pickle can run code when it is opened.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

import cir_core
from cir_core.schema import CirError

ALIASES = {"scenes-tiny": "models/scenes-tiny"}  # folders inside the package, in local-dir form
CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".bin", ".pth", ".ckpt", ".npz", ".npy")


@dataclass(frozen=True)
class ModelSource:
    """A model found. name: as open_clip spells it; weights: a safetensors file; options: for create_model."""

    model: str
    pretrained: str | None
    name: str
    weights: Path
    model_cfg: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


def find_model(model: str, pretrained: str | None = None) -> ModelSource:
    """Find configuration and weights, downloading them when the hub has to be asked.

    Raises CirError for an unknown name or tag (with near matches), a named model without a tag, a tag where
    none belongs, weights that are not safetensors, and a failed download.
    """
    if model in ALIASES:
        folder = Path(cir_core.__file__).parent / ALIASES[model]
        _refuse_pretrained(model, pretrained)
        return _from_folder(model, folder)
    if model.startswith("local-dir:"):
        _refuse_pretrained(model, pretrained)
        return _from_folder(model, Path(model.removeprefix("local-dir:")))
    if model.startswith("hf-hub:"):
        _refuse_pretrained(model, pretrained)
        return _from_hub(model)
    return _from_name(model.replace("/", "-"), pretrained)


def _from_folder(model: str, folder: Path) -> ModelSource:
    if not folder.is_dir():
        raise CirError(f"model {model!r}: {folder} is not a folder; give the folder that holds {CONFIG_NAME}")
    config = _read_config(model, folder / CONFIG_NAME)
    weights = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if weights is None:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in _WEIGHTS_SUFFIXES)
        raise CirError(
            f"model {model!r}: expected weights in {folder / WEIGHTS_NAMES[0]}, "
            f"found {', '.join(others) or 'none'}; {_WAY_OUT}"
        )
    return ModelSource(model, None, f"local-dir:{folder}", weights, config)


def _from_hub(model: str) -> ModelSource:
    repo = model.removeprefix("hf-hub:")
    config = _read_config(model, _download(model, repo, CONFIG_NAME))
    return ModelSource(model, None, model, _download(model, repo, WEIGHTS_NAMES[0]), config)


def _from_name(name: str, pretrained: str | None) -> ModelSource:
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        raise CirError(
            f"unknown model {name!r}{_near(name, [*open_clip.list_models(), *ALIASES])}; a folder is given "
            "as 'local-dir:/path', a hub repository as 'hf-hub:org/name'; open_clip.list_models() lists all"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise CirError(
            f"model {name!r} needs pretrained=, or its random weights would be scored; "
            f"tags: {', '.join(tags) or 'none'}; or the path of a .safetensors file"
        )
    tag = pretrained.lower().replace("-", "_")
    if tag in tags:
        return _from_tag(name, tag, config)
    if Path(pretrained).suffix in _WEIGHTS_SUFFIXES or "/" in pretrained:
        weights = Path(pretrained)
        _check_weights(f"pretrained={pretrained!r}", weights)
        # open_clip takes an existing path as weights; the activation is the configuration's (…-quickgelu
        # names).
        return ModelSource(name, f"file:{weights.name}", name, weights, config)
    raise CirError(
        f"model {name!r} has no weights tag {pretrained!r}{_near(tag, tags)}; "
        f"tags: {', '.join(tags) or 'none'} (open_clip.list_pretrained_tags_by_model({name!r}))"
    )


def _from_tag(name: str, tag: str, config: dict[str, Any]) -> ModelSource:
    facts = open_clip.get_pretrained_cfg(name, tag)
    repo, _, filename = facts.get("hf_hub", "").rpartition("/")
    if not repo:
        raise CirError(f"model {name!r}, tag {tag!r}: offered only as a pickle, which is never loaded; {_WAY_OUT}")
    weights = _download(f"{name} ({tag})", repo, Path(filename).stem + ".safetensors" if filename else WEIGHTS_NAMES[0])
    # OpenAI, MetaCLIP and DFN weights were trained with QuickGELU. open_clip only warns when the plain name
    # builds GELU, and the embeddings are then quietly wrong; the tag knows better.
    quick_gelu = bool(config.get("quick_gelu") or facts.get("quick_gelu"))
    options = {"force_quick_gelu": quick_gelu, "force_preprocess_cfg": facts}
    return ModelSource(name, tag, name, weights, {**config, "quick_gelu": quick_gelu}, options)


_WAY_OUT = (
    "convert a pickle you trust with safetensors.torch.save_file(torch.load(path, weights_only=True), "
    f"{WEIGHTS_NAMES[0]!r}) and load that"
)


def _check_weights(what: str, path: Path) -> None:
    if path.suffix != ".safetensors":
        raise CirError(f"{what}: {path.name} is not a .safetensors file; {_WAY_OUT}")
    if not path.is_file():
        raise CirError(f"{what}: no such file; give the path of a .safetensors file on this machine")


def _download(model: str, repo: str, filename: str) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(repo, filename))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            raise CirError(f"model {model!r}: {repo} on the hub has no {filename}; {_WAY_OUT}") from error
        reason: Exception = error
    except Exception as error:  # the hub's client raises its own, httpx's and the operating system's errors
        reason = error
    raise CirError(
        f"model {model!r}: cannot download {filename} of {repo} from the hub "
        f"({str(reason).splitlines()[0]}); check the name and the network, or download it beforehand "
        f"(hf download {repo}) and point HF_HOME at that cache, or use "
        "'local-dir:/path'"
    ) from reason


def _read_config(model: str, path: Path) -> dict[str, Any]:
    """model_cfg of an open_clip_config.json, refused when it asks for code or lacks a tower."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        tokenizer_kwargs = config["text_cfg"].get("tokenizer_kwargs") or {}
        missing = [key for key in ("embed_dim", "vision_cfg") if key not in config]
    except FileNotFoundError:
        raise CirError(
            f"model {model!r}: {path} is missing; the folder must hold {CONFIG_NAME} and {WEIGHTS_NAMES[0]}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CirError(
            f"model {model!r}: {path} is not an open_clip configuration ({type(error).__name__}: {error})"
        ) from None
    if missing:
        raise CirError(f"model {model!r}: {path} lacks {', '.join(missing)} in model_cfg")
    if tokenizer_kwargs.get("trust_remote_code"):
        raise CirError(f"model {model!r}: its tokenizer wants to run code of its own (trust_remote_code); refused")
    return dict(config)


def _refuse_pretrained(model: str, pretrained: str | None) -> None:
    if pretrained is not None:
        raise CirError(f"model {model!r} brings its own weights: leave out pretrained={pretrained!r}")


def _near(word: str, known: list[str]) -> str:
    folded = {name.lower(): name for name in known}
    near = [folded[match] for match in difflib.get_close_matches(word.lower(), folded, n=4)]
    return f", did you mean {' or '.join(near)}?" if near else ""
