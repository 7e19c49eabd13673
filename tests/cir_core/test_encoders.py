from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from cir_core import lora
from cir_core.encoders import Encoder, load_encoder
from cir_core.encoders.two_tower import OpenClipEncoder
from cir_core.schema import CirError

MakeModel = Callable[..., Path]
TEXTS = ["a red circle", "", "remove the small blue star and add a large yellow ring below the green square"]


@pytest.fixture(scope="module")
def encoder(tiny_model_dir: Path) -> OpenClipEncoder:
    return load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")


def pictures(encoder: Encoder, num: int = 3) -> torch.Tensor:
    size = encoder.preprocessing.size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator)


def copy_model(source: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "open_clip_config.json").read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    (target / "open_clip_config.json").write_text(json.dumps(config))
    return target


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's own offline switch, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty-cache"))


# ---- embeddings --------------------------------------------------------------------------------------------


def test_images_are_what_open_clip_computes(encoder: OpenClipEncoder, tiny_model_dir: Path) -> None:
    plain, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_model_dir}")
    images = pictures(encoder)
    pixels = torch.stack([transform.transforms[-1](image / 255) for image in images])  # torchvision's Normalize
    with torch.no_grad():
        expected = plain.eval().encode_image(pixels, normalize=True)
    actual = encoder.encode_images(images)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    assert actual.dtype == torch.float32
    assert actual.shape == (3, encoder.dim) == (3, 24)
    torch.testing.assert_close(actual.norm(dim=-1), torch.ones(3))


def test_texts_are_what_open_clip_computes(encoder: OpenClipEncoder, tiny_model_dir: Path) -> None:
    plain = open_clip.create_model(f"local-dir:{tiny_model_dir}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tiny_model_dir}")(TEXTS)
    with torch.no_grad():
        expected = plain.encode_text(tokens, normalize=True)
    actual = encoder.encode_texts(TEXTS)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    assert actual.shape == (3, 24)
    assert len(torch.unique(actual, dim=0)) == 3  # no two texts fall together, the empty one included


def test_many_texts_are_encoded_in_batches(encoder: OpenClipEncoder) -> None:
    texts = [f"a {colour} {shape} " * (i % 3) for i in range(100) for colour, shape in zip("ab", "cd", strict=True)]
    texts += TEXTS * 30
    alone = torch.cat([encoder.encode_texts([text]) for text in texts])
    torch.testing.assert_close(encoder.encode_texts(texts), alone, atol=1e-6, rtol=0)


def test_empty_batches(encoder: OpenClipEncoder) -> None:
    assert encoder.encode_texts([]).shape == (0, 24)
    assert encoder.encode_images(pictures(encoder, 0)).shape == (0, 24)
    assert encoder.count_truncated([]) == 0


def test_embeddings_can_enter_a_graph(encoder: OpenClipEncoder) -> None:
    """Tuning multiplies images with these texts; a tensor born in inference mode would refuse backward."""
    images = torch.randn(2, 24, requires_grad=True)
    (images @ encoder.encode_texts(TEXTS).T).sum().backward()
    assert images.grad is not None


def test_count_truncated(encoder: OpenClipEncoder, tmp_path: Path, make_tiny_model_dir: MakeModel) -> None:
    simple = load_encoder(f"local-dir:{make_tiny_model_dir(tmp_path / 'm', simple_tokenizer=True)}", device="cpu")
    for each in (encoder, simple):  # 16 places, two of them for start and end
        texts = [" ".join(["red"] * num) for num in (0, 13, 14, 15, 40)]
        assert [each.count_truncated([text]) for text in texts] == [0, 0, 0, 1, 1]
        assert each.count_truncated(texts) == 2
        fits, cut, longer = (each.encode_texts([text]) for text in texts[2:])
        assert torch.equal(fits, cut)
        assert torch.equal(cut, longer)


def test_bf16_is_close_and_returns_float32(encoder: OpenClipEncoder, tiny_model_dir: Path) -> None:
    low = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu", precision="bf16")
    assert (low.details.precision, encoder.details.precision) == ("bf16", "fp32")
    for full, half in (
        (encoder.encode_images(pictures(encoder)), low.encode_images(pictures(encoder))),
        (encoder.encode_texts(TEXTS), low.encode_texts(TEXTS)),
    ):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.norm(dim=-1), torch.ones(3))
        assert not torch.equal(full, half)  # it did compute in bf16
        assert (full * half).sum(-1).min() > 0.999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu(encoder: OpenClipEncoder, tiny_model_dir: Path) -> None:
    auto = load_encoder(f"local-dir:{tiny_model_dir}")
    assert (auto.device.type, auto.details.precision) == ("cuda", "bf16")
    assert auto.identity == encoder.identity
    full = load_encoder(f"local-dir:{tiny_model_dir}", precision="fp32")
    for name, inputs in (("encode_images", pictures(encoder)), ("encode_texts", TEXTS)):
        expected = getattr(encoder, name)(inputs)
        assert (getattr(auto, name)(inputs).cpu() * expected).sum(-1).min() > 0.999
        torch.testing.assert_close(getattr(full, name)(inputs).cpu(), expected, atol=2e-3, rtol=0)


def test_model_is_frozen_and_in_eval_mode(encoder: OpenClipEncoder) -> None:
    assert isinstance(encoder, Encoder)
    assert not encoder.model.training
    assert lora.count_parameters(encoder.model)[0] == 0


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 32, 32),
        torch.zeros(2, 32, 32, 3, dtype=torch.uint8),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
    ],
    ids=["float", "channels_last", "no_batch", "size"],
)
def test_wrong_images(encoder: OpenClipEncoder, images: torch.Tensor) -> None:
    with pytest.raises(CirError, match=r"uint8\[B, 3, 32, 32\]"):
        encoder.encode_images(images)


@pytest.mark.parametrize("texts", ["a red circle", ["a", None], [b"a"]])
def test_wrong_texts(encoder: OpenClipEncoder, texts: list[str]) -> None:
    with pytest.raises(CirError, match="list of str"):
        encoder.encode_texts(texts)


# ---- identity and preprocessing ----------------------------------------------------------------------------


def test_preprocessing_is_the_models(encoder: OpenClipEncoder, tiny_model_dir: Path, tmp_path: Path) -> None:
    assert encoder.preprocessing.size == 32
    assert encoder.preprocessing.mode == "center_crop"
    assert encoder.preprocessing.interpolation == "bilinear"
    assert encoder.mean == (0.5, 0.4, 0.3)
    squash = copy_model(tiny_model_dir, tmp_path / "squash", preprocess_cfg__resize_mode="squash")
    assert load_encoder(f"local-dir:{squash}", device="cpu").preprocessing.mode == "squash"


def test_identity_changes_with_everything_that_changes_embeddings(
    encoder: OpenClipEncoder, tiny_model_dir: Path, tmp_path: Path, make_tiny_model_dir: MakeModel
) -> None:
    def identity(folder: Path, **kwargs: str) -> str:
        return load_encoder(f"local-dir:{folder}", device="cpu", **kwargs).identity  # type: ignore[arg-type]

    tokenizer = copy_model(tiny_model_dir, tmp_path / "a" / "tiny") / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"red": ', '"crimson": '))
    others = {
        "weights": identity(make_tiny_model_dir(tmp_path / "b" / "tiny", seed=1)),
        "activation": identity(copy_model(tiny_model_dir, tmp_path / "c" / "tiny", model_cfg__quick_gelu=True)),
        "mean": identity(copy_model(tiny_model_dir, tmp_path / "d" / "tiny", preprocess_cfg__mean=[0, 0, 0])),
        "interpolation": identity(
            copy_model(tiny_model_dir, tmp_path / "e" / "tiny", preprocess_cfg__interpolation="bicubic")
        ),
        "mode": identity(tiny_model_dir, preprocessing_mode="squash"),
        "tokenizer": identity(tokenizer.parent),
        "name": identity(copy_model(tiny_model_dir, tmp_path / "other")),
        "adapter": identity(tiny_model_dir, adapter=str(save_random_adapter(tiny_model_dir, tmp_path / "ad"))),
    }
    assert len({encoder.identity, *others.values()}) == 1 + len(others)
    same = {
        identity(copy_model(tiny_model_dir, tmp_path / "moved" / "tiny")),
        identity(tiny_model_dir),
        identity(tiny_model_dir, precision="bf16"),
    }
    assert same == {encoder.identity}
    assert "\n" not in encoder.identity


def test_identity_survives_use(encoder: OpenClipEncoder, tiny_model_dir: Path) -> None:
    used = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    used.encode_texts(TEXTS)
    used.count_truncated(TEXTS)
    assert used.identity == encoder.identity
    assert used.details == encoder.details
    json.dumps(dataclasses.asdict(used.details))  # goes into manifests


# ---- adapters ----------------------------------------------------------------------------------------------


def save_random_adapter(model: Path | str, folder: Path) -> Path:
    encoder = load_encoder(model if isinstance(model, str) else f"local-dir:{model}", device="cpu")
    torch.manual_seed(0)
    lora.attach_lora(encoder.model)
    for parameter in encoder.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    details = encoder.details
    lora.save_adapter(
        encoder.model,
        folder,
        lora.TatMetadata(
            base_model=details.model, weights_digest=details.weights_digest, quick_gelu=details.quick_gelu
        ),
    )
    return folder


def test_adapter_reloads_with_the_same_embeddings(tiny_model_dir: Path, tmp_path: Path) -> None:
    tuned = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    torch.manual_seed(0)
    lora.attach_lora(tuned.model)
    for parameter in tuned.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = save_random_adapter(tiny_model_dir, tmp_path / "adapter")
    reloaded = load_encoder(f"local-dir:{tiny_model_dir}", adapter=adapter, device="cpu")
    base = load_encoder(f"local-dir:{tiny_model_dir}", device="cpu")
    tuned.model.eval().requires_grad_(False)  # as load_encoder leaves it; the flag decides the last bits of a matmul
    images = pictures(base)
    assert torch.equal(reloaded.encode_images(images), tuned.encode_images(images))
    assert torch.equal(reloaded.encode_texts(TEXTS), base.encode_texts(TEXTS))
    assert not torch.allclose(reloaded.encode_images(images), base.encode_images(images), atol=1e-3)
    assert reloaded.details.adapter_digest == lora.adapter_digest(adapter)
    assert reloaded.details.weights_digest == base.details.weights_digest


def test_exported_model_loads_as_an_encoder(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = save_random_adapter(tiny_model_dir, tmp_path / "adapter")
    tuned = load_encoder(f"local-dir:{tiny_model_dir}", adapter=adapter, device="cpu")
    lora.export_merged(tuned.model, tmp_path / "export", model_cfg=tuned.model_cfg, tokenizer=tuned.tokenizer)
    merged = load_encoder(f"local-dir:{tmp_path / 'export'}", device="cpu")
    images = pictures(tuned)
    torch.testing.assert_close(merged.encode_images(images), tuned.encode_images(images), atol=1e-5, rtol=0)
    assert torch.equal(merged.encode_texts(TEXTS), tuned.encode_texts(TEXTS))
    assert merged.preprocessing == tuned.preprocessing
    assert merged.details.tokenizer_digest == tuned.details.tokenizer_digest


def test_adapter_of_another_model(tiny_model_dir: Path, tmp_path: Path, make_tiny_model_dir: MakeModel) -> None:
    adapter = save_random_adapter(make_tiny_model_dir(tmp_path / "other", seed=1), tmp_path / "adapter")
    with pytest.raises(CirError, match=f"tuned from 'local-dir:{tmp_path}/other'.*not from 'local-dir:"):
        load_encoder(f"local-dir:{tiny_model_dir}", adapter=adapter)


# ---- names, tags, files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B32", None, r"unknown model 'ViT-B32', did you mean ViT-B-32\b.*list_models"),
        ("scene-tiny", None, "did you mean scenes-tiny"),
        ("ViT-B-32", None, "random weights would be scored; tags: openai, .*laion2b_s34b_b79k"),
        (
            "ViT-B-32",
            "openia",
            r"no weights tag 'openia', did you mean openai.*list_pretrained_tags_by_model",
        ),
        ("ViT-B-32", "weights.pt", "weights.pt is not a .safetensors file; convert"),
        ("ViT-B-32", "/nowhere/weights.safetensors", "no such file"),
        ("local-dir:/nowhere", None, "/nowhere is not a folder"),
        ("local-dir:/tmp", "openai", "brings its own weights: leave out pretrained='openai'"),
        ("blip:/nowhere", "coco", "brings its own weights: leave out pretrained='coco'"),
    ],
)
def test_mistaken_names(model: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(CirError, match=message):
        load_encoder(model, pretrained)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("model", "pretrained"),
    [
        ("ViT-B-32", "openai"),
        ("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", None),
        ("blip:Salesforce/blip-itm-large-coco", None),
    ],
)
def test_no_network(model: str, pretrained: str | None) -> None:
    with pytest.raises(CirError, match=rf"{model}.*(cannot|be) download.*HF_HOME.*(local-dir:|folder)"):
        load_encoder(model, pretrained)


def test_device_and_precision_are_checked(tiny_model_dir: Path) -> None:
    model = f"local-dir:{tiny_model_dir}"
    with pytest.raises(CirError, match="precision must be"):
        load_encoder(model, precision="fp16")
    with pytest.raises(CirError, match="device must be"):
        load_encoder(model, device="gpu")
    with pytest.raises(CirError, match="is not here"):
        load_encoder(model, device="cuda:99")


def test_folders_that_are_not_models(tiny_model_dir: Path, tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(CirError, match=message):
            load_encoder(f"local-dir:{folder}", device="cpu")

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "open_clip_config.json is missing")

    no_weights = copy_model(tiny_model_dir, tmp_path / "no_weights")
    (no_weights / "open_clip_model.safetensors").rename(no_weights / "open_clip_pytorch_model.bin")
    refused(no_weights, "found open_clip_pytorch_model.bin; convert a pickle")

    not_json = copy_model(tiny_model_dir, tmp_path / "not_json")
    (not_json / "open_clip_config.json").write_text("{}")
    refused(not_json, "not an open_clip configuration .KeyError: 'model_cfg'")

    remote_code = copy_model(tiny_model_dir, tmp_path / "remote_code")
    config = json.loads((remote_code / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (remote_code / "open_clip_config.json").write_text(json.dumps(config))
    refused(remote_code, "trust_remote_code")

    refused(copy_model(tiny_model_dir, tmp_path / "shape", model_cfg__embed_dim=48), "size mismatch")
    missing = copy_model(tiny_model_dir, tmp_path / "missing")
    tensors = load_file(missing / "open_clip_model.safetensors")
    del tensors["visual.proj"]
    save_file(tensors, missing / "open_clip_model.safetensors")
    refused(missing, r"Missing key.*visual\.proj")

    damaged = copy_model(tiny_model_dir, tmp_path / "damaged")
    (damaged / "open_clip_model.safetensors").write_bytes(b"\x08" + b"\0" * 40)
    refused(damaged, "cannot load model")

    no_tokenizer = copy_model(tiny_model_dir, tmp_path / "no_tokenizer")
    for path in no_tokenizer.glob("tokenizer*"):
        path.unlink()
    refused(no_tokenizer, "tokenizer of model .* beside the weights")


def test_a_tag_brings_its_activation_and_normalisation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """OpenAI's weights need QuickGELU, which the plain name does not build: open_clip would only warn."""
    from cir_core.encoders import sources

    monkeypatch.setattr(sources, "_download", lambda *args: tmp_path / "weights.safetensors")
    openai, laion = (sources.find_model("ViT-B/32", tag) for tag in ("openai", "laion2b-s34b-b79k"))
    assert (openai.name, openai.pretrained, laion.pretrained) == ("ViT-B-32", "openai", "laion2b_s34b_b79k")
    assert (openai.options["force_quick_gelu"], laion.options["force_quick_gelu"]) == (True, False)
    assert (openai.model_cfg["quick_gelu"], laion.model_cfg["quick_gelu"]) == (True, False)
    assert sources.find_model("ViT-B-32-quickgelu", "openai").options["force_quick_gelu"] is True
    siglip = sources.find_model("ViT-B-16-SigLIP", "webli").options["force_preprocess_cfg"]
    assert (siglip["mean"], siglip["resize_mode"]) == ((0.5, 0.5, 0.5), "squash")


@pytest.mark.slow
def test_real_vit_b_32_loads_by_folder_and_by_file(tmp_path: Path) -> None:
    config = open_clip.get_model_config("ViT-B-32")
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    by_folder = load_encoder(f"local-dir:{tmp_path}", device="cpu")
    by_file = load_encoder("ViT-B-32", str(tmp_path / "open_clip_model.safetensors"), device="cpu")
    assert (by_folder.dim, by_folder.preprocessing.size, by_folder.details.context_length) == (512, 224, 77)
    assert by_folder.details.weights_digest == by_file.details.weights_digest == lora.weights_digest(model)
    assert by_folder.identity != by_file.identity  # another name
    images = pictures(by_folder, 2)
    assert torch.equal(by_folder.encode_images(images), by_file.encode_images(images))
    assert torch.equal(by_folder.encode_texts(TEXTS), by_file.encode_texts(TEXTS))
    assert torch.equal(by_folder.tokenize(["a red circle"]), open_clip.get_tokenizer("ViT-B-32")("a red circle"))


# ---- BLIP --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BLIP with random weights, as transformers saves it, and a WordPiece tokenizer."""
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval

    folder = tmp_path_factory.mktemp("blip") / "blip-tiny"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "red",
        "circle",
        "green",
        "square",
        "the",
        "add",
    ]
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BlipConfig(
        text_config={**size, "vocab_size": len(words), "encoder_hidden_size": 32, "max_position_embeddings": 40},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        image_text_hidden_size=24,
    )
    blip = BlipForImageTextRetrieval(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in blip.parameters():  # the library starts the image tower at 1e-10: every picture would look alike
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    blip.save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    return folder


def test_blip_is_what_transformers_computes(blip_dir: Path) -> None:
    from transformers import AutoTokenizer, BlipForImageTextRetrieval

    encoder = load_encoder(f"blip:{blip_dir}", device="cpu")
    texts = ["a red circle", "", "add the green square"]
    images = pictures(encoder)
    pixels = (images / 255 - 0.5) / torch.tensor(encoder.std).view(3, 1, 1)
    inputs = AutoTokenizer.from_pretrained(blip_dir)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        blip = BlipForImageTextRetrieval.from_pretrained(blip_dir).eval()
        expected = blip(
            pixel_values=pixels,
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            use_itm_head=False,
        ).itm_score
    assert torch.pdist(encoder.encode_images(images)).min() > 0.01  # pictures come through, not a constant
    cosines = encoder.encode_images(images) @ encoder.encode_texts(texts).T
    torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)
    assert (encoder.dim, encoder.preprocessing.mode, encoder.details.context_length) == (24, "squash", 35)
    assert encoder.count_truncated([" ".join(["red"] * num) for num in (33, 34)]) == 1


def test_blip_takes_an_adapter(blip_dir: Path, tmp_path: Path) -> None:
    tuned = load_encoder(f"blip:{blip_dir}", device="cpu")
    images, base = pictures(tuned), tuned.encode_images(pictures(tuned))
    report = lora.attach_lora(tuned.model, r=4)
    assert len(report.adapted) == 4
    torch.testing.assert_close(tuned.encode_images(images), base, atol=1e-6, rtol=0)
    adapter = save_random_adapter(f"blip:{blip_dir}", tmp_path / "adapter")
    reloaded = load_encoder(f"blip:{blip_dir}", adapter=adapter, device="cpu")
    assert not torch.allclose(reloaded.encode_images(images), base, atol=1e-3)
    merged = lora.merge_adapter(reloaded.model)
    with torch.no_grad():
        embeddings = merged.encode_image(reloaded.normalize(images), normalize=True)
    torch.testing.assert_close(embeddings, reloaded.encode_images(images), atol=1e-5, rtol=0)
    with pytest.raises(CirError, match="only open_clip models"):
        lora.export_merged(tuned.model, tmp_path / "x", model_cfg=tuned.model_cfg, tokenizer=tuned.tokenizer)


def test_blip_checkpoints_with_holes_are_refused(blip_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(blip_dir, tmp_path / "blip")
    tensors = load_file(tmp_path / "blip" / "model.safetensors")
    del tensors["vision_proj.weight"]
    save_file(tensors, tmp_path / "blip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CirError, match=r"1 weights are missing, first vision_proj\.weight"):
        load_encoder(f"blip:{tmp_path / 'blip'}")
    (tmp_path / "blip" / "model.safetensors").unlink()
    with pytest.raises(CirError, match="a pickle is never loaded"):
        load_encoder(f"blip:{tmp_path / 'blip'}")
