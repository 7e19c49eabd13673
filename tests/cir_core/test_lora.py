from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import peft
import pytest
import torch
from torch import nn

from cir_core import lora
from cir_core.schema import CirError

MakeModel = Callable[..., Path]
CAPTIONS = ["a red circle", "", "make the square green and move it to the left " * 3]


def load(folder: Path) -> nn.Module:
    return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()


def pixels(model: nn.Module, num: int = 3, seed: int = 0) -> torch.Tensor:
    height, width = model.visual.image_size
    return torch.randn(num, 3, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def embed(model: nn.Module) -> torch.Tensor:
    return model.encode_image(pixels(model), normalize=True)


def disturb(model: nn.Module, std: float = 0.1) -> None:
    """Give B values other than its zeros, as tuning does."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std, generator=generator)


def metadata(model: nn.Module, **kwargs: object) -> lora.TatMetadata:
    facts = {"base_model": "tiny", "weights_digest": lora.weights_digest(model), **kwargs}
    return lora.TatMetadata(**facts)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def timm_dir(tmp_path_factory: pytest.TempPathFactory, make_tiny_model_dir: MakeModel) -> Path:
    return make_tiny_model_dir(tmp_path_factory.mktemp("timm") / "timm", vision="timm")


@pytest.fixture(params=["vit", "timm"])
def model_dir(request: pytest.FixtureRequest, tiny_model_dir: Path, timm_dir: Path) -> Path:
    return {"vit": tiny_model_dir, "timm": timm_dir}[request.param]


@pytest.fixture
def model(tiny_model_dir: Path) -> nn.Module:
    return load(tiny_model_dir)


@pytest.fixture
def adapter(model: nn.Module, tmp_path: Path) -> Path:
    tat = metadata(model, steps=7, loss={"temperature": 0.07})
    lora.attach_lora(model)
    disturb(model)
    lora.save_adapter(model, tmp_path / "adapter", tat)
    return tmp_path / "adapter"


def attach_saved(model: nn.Module, folder: Path | str, **kwargs: object) -> str:
    facts = {"base_model": "tiny", "expected_weights_digest": lora.weights_digest(model), **kwargs}
    return lora.load_adapter(model, folder, **facts)  # type: ignore[arg-type]


# ---- attention ---------------------------------------------------------------------------------------------


def test_split_equals_fused_and_fusing_restores_every_byte(model_dir: Path) -> None:
    model = load(model_dir)
    before, digest = embed(model), lora.weights_digest(model)
    num_layers = {"VisionTransformer": 2, "TimmModel": 12}[type(model.visual).__name__]
    assert lora.split_attention(model.visual) == num_layers
    assert lora.weights_digest(model) != digest  # other parameter names: the split really happened
    torch.testing.assert_close(embed(model), before, atol=1e-6, rtol=0)
    assert lora.fuse_attention(model.visual) == num_layers
    assert lora.weights_digest(model) == digest
    assert torch.equal(embed(model), before)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "float", "bool", "per_head"])
@pytest.mark.parametrize(("kdim", "bias"), [(None, True), (None, False), (12, True)])
def test_split_attention_is_multihead_attention(batch_first: bool, mask: str, kdim: int | None, bias: bool) -> None:
    torch.manual_seed(0)
    fused = nn.MultiheadAttention(16, 4, batch_first=batch_first, kdim=kdim, vdim=kdim, bias=bias)
    if bias:  # torch starts biases at zero, where a lost or swapped one would not show
        nn.init.normal_(fused.in_proj_bias)
        nn.init.normal_(fused.out_proj.bias)
    split = lora.SplitAttention(fused)
    query, key = torch.randn(3, 5, 16), torch.randn(3, 7, kdim or 16)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    allowed = torch.rand(5, 7) > 0.3
    allowed[:, 0] = True
    masks = {
        "none": None,
        "float": torch.randn(5, 7),
        "bool": ~allowed,
        "per_head": torch.randn(3 * 4, 5, 7),
    }
    arguments = {"need_weights": False, "attn_mask": masks[mask]}
    expected = fused(query, key, key, **arguments)[0]
    torch.testing.assert_close(split(query, key, key, **arguments)[0], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(split.fuse()(query, key, key, **arguments)[0], expected, atol=0, rtol=0)


def test_split_attention_refuses_what_it_cannot_do() -> None:
    split = lora.SplitAttention(nn.MultiheadAttention(8, 2))
    x = torch.randn(3, 1, 8)
    with pytest.raises(NotImplementedError, match="need_weights=False"):
        split(x, x, x, need_weights=True)
    with pytest.raises(CirError, match="add_bias_kv"):
        lora.SplitAttention(nn.MultiheadAttention(8, 2, add_bias_kv=True))


def test_eva_attention_with_biases_of_its_own() -> None:
    """EVA reads qkv.weight unless told otherwise: an adapter on the split projections would never run."""
    from timm.models.eva import EvaAttention

    torch.manual_seed(0)
    tower = nn.Sequential(EvaAttention(16, num_heads=2, qkv_fused=True, scale_norm=False)).eval()
    nn.init.normal_(tower[0].q_bias)
    nn.init.normal_(tower[0].v_bias)
    x = torch.randn(2, 5, 16)
    before = tower(x)
    assert lora.split_attention(tower) == 1
    torch.testing.assert_close(tower(x), before, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        tower[0].qkv.q_proj.weight.zero_()
    assert not torch.allclose(tower(x), before, atol=1e-3)
    assert lora.fuse_attention(tower) == 1
    assert isinstance(tower[0].qkv, nn.Linear)
    assert tower[0].qkv_bias_separate is False


# ---- attach ------------------------------------------------------------------------------------------------


def test_attach_changes_no_output_and_trains_only_lora(model_dir: Path) -> None:
    model = load(model_dir)
    before = embed(model)
    report = lora.attach_lora(model, r=4, lora_alpha=8, lora_dropout=0.0)
    torch.testing.assert_close(embed(model), before, atol=1e-6, rtol=0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.startswith("visual.") and "lora_" in name for name in trainable)
    width, layers = (192, 12) if model_dir.name == "timm" else (32, 2)
    assert report.trainable == layers * 2 * (width * 4 * 2) == lora.count_parameters(model)[0]
    assert len(report.adapted) == 2 * layers
    assert report.fraction == report.trainable / report.total


@pytest.mark.parametrize(("name", "percent"), [("ViT-B-32", 0.39), ("ViT-L-14", 0.37)])
def test_paper_settings_train_the_published_share(name: str, percent: float) -> None:
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
        report = lora.attach_lora(model)  # the defaults are the paper's
    assert (report.r, report.lora_alpha, report.lora_dropout) == (16, 16, 0.1)
    assert round(100 * report.fraction, 2) == percent
    assert report.fraction < 0.005


def step(model: nn.Module, optimizer: torch.optim.Optimizer, texts: torch.Tensor) -> float:
    logits = model.encode_image(pixels(model), normalize=True) @ texts.T / 0.07
    loss = nn.functional.cross_entropy(logits, torch.arange(len(texts)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_tuning_leaves_the_text_tower_bit_identical(model: nn.Module) -> None:
    torch.manual_seed(0)
    model.requires_grad_(False)  # torch.matmul picks its kernel by this flag: without it the last bits differ
    base, text_digest = embed(model), lora.weights_digest(model, without="visual.")
    tokens = torch.tensor([[1, 5, 9, 40], [1, 6, 30, 40], [1, 7, 25, 40]])
    tokens = nn.functional.pad(tokens, (0, 12))
    with torch.no_grad():
        texts = model.encode_text(tokens, normalize=True)
    lora.attach_lora(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen["visual.base_model.model.conv1.weight"].numel()
    model.visual.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = [step(model, optimizer, texts) for _ in range(8)]
    model.eval()
    assert losses[-1] < losses[0]
    assert not torch.allclose(embed(model), base, atol=1e-3)
    assert lora.weights_digest(model, without="visual.") == text_digest
    with torch.no_grad():
        assert torch.equal(model.encode_text(tokens, normalize=True), texts)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
            assert parameter.grad is None, name


@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model_dir: Path, autocast: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(model_dir)
        torch.manual_seed(0)
        lora.attach_lora(model, lora_dropout=0.0)
        disturb(model)
        model.visual.train()
        model.visual.set_grad_checkpointing(checkpointing)
        inner = getattr(model.visual.base_model.model, "trunk", None) or model.visual.transformer
        assert inner.grad_checkpointing is checkpointing
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model.encode_image(pixels(model, 1), normalize=True).float().pow(3).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(g is not None and g.abs().sum() > 0 and torch.isfinite(g).all() for g in gradients[-1])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-4)


def test_unmatched_target_is_refused_with_the_layers_there_are(model: nn.Module) -> None:
    digest = lora.weights_digest(model)
    with pytest.raises(CirError, match=r"'q_prj' matches no layer.*did you mean q_proj.*c_fc.*v_proj"):
        lora.attach_lora(model, target_modules=["v_proj", "q_prj"])
    assert lora.weights_digest(model) == digest  # as it was, not half split
    given = {"r": 4, "lora_alpha": 4, "lora_dropout": 0.0}
    with pytest.raises(CirError, match="'q_prj' matches no layer"):
        lora.check_lora(model, target_modules=["v_proj", "q_prj"], **given)
    lora.check_lora(model, target_modules=["q_proj", "c_fc"], **given)
    assert lora.weights_digest(model) == digest
    assert lora.attach_lora(model, target_modules=["q_proj", "c_fc"]).trainable > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r >= 1"),
        ({"lora_dropout": 1.0}, "lora_dropout < 1"),
        ({"lora_alpha": 0}, "lora_alpha > 0"),
        ({"target_modules": "q_proj"}, "must be a list"),
        ({"target_modules": []}, "is empty"),
    ],
)
def test_settings_out_of_range(model: nn.Module, settings: dict[str, object], message: str) -> None:
    with pytest.raises(CirError, match=message):
        lora.attach_lora(model, **settings)  # type: ignore[arg-type]
    usual = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj"]}
    with pytest.raises(CirError, match=message):
        lora.check_lora(model, **(usual | settings))  # type: ignore[arg-type]


def test_second_adapter_and_batch_norm_are_refused(model: nn.Module) -> None:
    lora.attach_lora(model)
    with pytest.raises(CirError, match="already has an adapter"):
        lora.attach_lora(model)
    resnet = open_clip.CLIP(
        8,
        {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 8},
        {"width": 8, "heads": 1, "layers": 1},
    )
    with pytest.raises(CirError, match="BatchNorm"):
        lora.attach_lora(resnet)


# ---- save, load --------------------------------------------------------------------------------------------


def test_adapter_round_trip_is_exact(model: nn.Module, adapter: Path, tiny_model_dir: Path) -> None:
    assert sorted(p.name for p in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tat.json",
    ]
    tat = lora.TatMetadata.read(adapter)
    assert (tat.base_model, tat.steps, tat.loss) == ("tiny", 7, {"temperature": 0.07})
    fresh = load(tiny_model_dir)
    base = embed(fresh)
    assert attach_saved(fresh, adapter) == lora.adapter_digest(adapter)
    assert torch.equal(embed(fresh), embed(model))
    assert not torch.allclose(embed(fresh), base, atol=1e-3)
    assert lora.count_parameters(fresh)[0] == 0
    assert not adapter.with_name("x").exists()


def test_peft_alone_reads_the_folder(model: nn.Module, adapter: Path, tiny_model_dir: Path) -> None:
    fresh = load(tiny_model_dir)
    lora.split_attention(fresh.visual)
    fresh.visual = peft.PeftModel.from_pretrained(fresh.visual, str(adapter))
    assert torch.equal(embed(fresh), embed(model))


def test_loaded_adapter_can_be_tuned_on(adapter: Path, tiny_model_dir: Path) -> None:
    fresh = load(tiny_model_dir)
    attach_saved(fresh, adapter, trainable=True)
    trainable = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_adapter_from_a_file_uri(adapter: Path, tiny_model_dir: Path) -> None:
    assert attach_saved(load(tiny_model_dir), adapter.as_uri()) == lora.adapter_digest(adapter)


def test_adapter_from_a_remote_store(adapter: Path, model: nn.Module, tiny_model_dir: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(f"{adapter}/", "/tat-test/adapter/", recursive=True)
    fresh = load(tiny_model_dir)
    assert attach_saved(fresh, "memory://tat-test/adapter") == lora.adapter_digest(adapter)
    assert torch.equal(embed(fresh), embed(model))


def test_adapter_of_another_model_is_refused(adapter: Path, tmp_path: Path, make_tiny_model_dir: MakeModel) -> None:
    other = load(make_tiny_model_dir(tmp_path / "other", seed=1))
    digest = lora.weights_digest(other)
    with pytest.raises(CirError, match=r"tuned from 'tiny'.*not from 'other'"):
        attach_saved(other, adapter, base_model="other")
    assert lora.weights_digest(other) == digest
    assert not lora.has_adapter(other)


def test_adapter_of_another_activation_is_refused(model: nn.Module, tmp_path: Path, tiny_model_dir: Path) -> None:
    tat = metadata(model, quick_gelu=True)
    lora.attach_lora(model)
    lora.save_adapter(model, tmp_path / "adapter", tat)
    with pytest.raises(CirError, match="quick_gelu=True"):
        attach_saved(load(tiny_model_dir), tmp_path / "adapter", quick_gelu=False)
    attach_saved(load(tiny_model_dir), tmp_path / "adapter", quick_gelu=True)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_refused_folders(adapter: Path, model: nn.Module, tiny_model_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights, config, tat = (adapter / n for n in ("adapter_model.safetensors", "adapter_config.json", "tat.json"))
    originals = {path: path.read_bytes() for path in (weights, config, tat)}
    fresh = load(tiny_model_dir)
    digest = lora.weights_digest(fresh)

    def refused(message: str) -> None:
        with pytest.raises(CirError, match=message):
            attach_saved(fresh, adapter, expected_weights_digest=digest)
        assert lora.weights_digest(fresh) == digest  # the model is as it was
        for path, content in originals.items():
            path.write_bytes(content)

    edit(config, peft_type="LOHA")
    refused("peft_type is 'LOHA'")
    edit(config, megatron_config={"a": 1}, megatron_core="os")
    refused("megatron_config")
    edit(config, init_lora_weights="pissa")
    refused("init_lora_weights='pissa'")
    edit(config, modules_to_save=["proj"])
    refused("modules_to_save")
    edit(config, target_modules=["q_proj", "gone"])
    refused("'gone' matches no layer")
    edit(config, target_modules="all-linear")
    refused("list of layer names")
    edit(config, r=8)
    refused("does not fit")
    edit(tat, colour="red")
    refused("unknown keys .*colour")
    config.write_text("{")
    refused("not valid JSON")
    tat.unlink()
    refused("tat.json is missing")
    weights.write_bytes(b"\x08" + b"\0" * 40)
    refused("not a readable safetensors")
    tensors = load_file(weights)
    tensors.popitem()
    save_file(tensors, weights)
    refused("1 tensors are missing")
    weights.unlink()
    refused("found no weights")
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    refused("adapter_model.bin, a pickle, which is never loaded")
    attach_saved(fresh, adapter)


def test_saving_needs_an_adapter_and_a_free_folder(model: nn.Module, adapter: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(CirError, match="no adapter to save"):
        lora.save_adapter(load(tiny_model_dir), adapter.with_name("new"), lora.TatMetadata.read(adapter))
    with pytest.raises(CirError, match="already exists"):
        lora.save_adapter(model, adapter, lora.TatMetadata.read(adapter))
    old = lora.adapter_digest(adapter)
    disturb(model, std=0.2)
    new = lora.save_adapter(model, adapter, lora.TatMetadata.read(adapter), overwrite=True)
    assert lora.adapter_digest(adapter) == new != old
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]  # no temporary folder left


def test_a_failed_save_leaves_nothing(model: nn.Module, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tat = lora.TatMetadata.read(adapter)
    before = lora.adapter_digest(adapter)
    with pytest.raises(TypeError):
        lora.save_adapter(
            model,
            adapter,
            lora.TatMetadata(base_model="x", weights_digest="y", extra={"a": object()}),
            overwrite=True,
        )
    assert lora.adapter_digest(adapter) == before
    assert lora.TatMetadata.read(adapter) == tat
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]


def test_digest_follows_function_not_provenance(adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    before = lora.adapter_digest(adapter)
    edit(config, peft_version="9", base_model_name_or_path="elsewhere", target_modules=["v_proj", "q_proj"])
    assert lora.adapter_digest(adapter) == before
    edit(config, lora_alpha=32)
    assert lora.adapter_digest(adapter) != before


@pytest.mark.slow
@pytest.mark.long
def test_saved_bytes_do_not_depend_on_the_hash_seed(tiny_model_dir: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch, open_clip; from cir_core import lora; torch.manual_seed(0)\n"
        "m = open_clip.create_model('local-dir:' + sys.argv[1])\n"
        "lora.attach_lora(m, target_modules=['q_proj', 'v_proj', 'k_proj', 'out_proj', 'c_fc'])\n"
        "lora.save_adapter(m, sys.argv[2], lora.TatMetadata(base_model='tiny', weights_digest='0'))"
    )
    for seed in "12":
        subprocess.run(
            [sys.executable, "-c", code, str(tiny_model_dir), str(tmp_path / seed)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name


# ---- merge, export -----------------------------------------------------------------------------------------


def test_merge_is_a_plain_copy(model_dir: Path) -> None:
    model = load(model_dir)
    names = list(model.state_dict())
    lora.attach_lora(model)
    disturb(model)
    tuned = embed(model)
    merged = lora.merge_adapter(model)
    assert list(merged.state_dict()) == names
    assert not any("peft" in type(m).__module__ or "cir_core" in type(m).__module__ for m in merged.modules())
    torch.testing.assert_close(embed(merged), tuned, atol=1e-5, rtol=0)
    assert torch.equal(embed(model), tuned)  # the tuned model keeps its adapter
    assert lora.has_adapter(model)


def test_fusing_over_an_adapter_is_refused(model: nn.Module) -> None:
    lora.attach_lora(model)
    with pytest.raises(CirError, match="merge it first"):
        lora.fuse_attention(model.visual)


def model_cfg(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    return content


@pytest.mark.parametrize(
    "variant",
    [
        {"quick_gelu": True},
        {"vision": "timm"},
        {"simple_tokenizer": True},
        {"custom_text": True, "init_logit_bias": -10.0},
    ],
    ids=["quick_gelu", "timm", "simple_tokenizer", "custom_text"],
)
def test_plain_open_clip_reads_the_export(
    variant: dict[str, object], tmp_path: Path, make_tiny_model_dir: MakeModel
) -> None:
    source = make_tiny_model_dir(tmp_path / "source", **variant)
    model = load(source)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{source}")
    lora.attach_lora(model)
    disturb(model)
    lora.export_merged(model, tmp_path / "export", model_cfg=model_cfg(source), tokenizer=tokenizer)

    plain, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
    plain.eval().requires_grad_(False)  # as `model` after attach_lora: the flag decides the last bits of a matmul
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'export'}")(CAPTIONS)
    assert torch.equal(tokens, tokenizer(CAPTIONS))
    torch.testing.assert_close(embed(plain), embed(model), atol=1e-5, rtol=0)
    with torch.no_grad():
        assert torch.equal(plain.encode_text(tokens), model.encode_text(tokens))
    assert "mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3]" in str(preprocess)
    assert plain.visual.preprocess_cfg == model.visual.preprocess_cfg


def test_export_refuses_diverged_weights_and_wrong_tokenizers(
    model: nn.Module, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = model_cfg(tiny_model_dir)
    with pytest.raises(CirError, match="SimpleTokenizer was given"):
        lora.export_merged(model, tmp_path / "export", model_cfg=config, tokenizer=open_clip.SimpleTokenizer())
    with torch.no_grad():
        model.visual.proj[0, 0] = float("nan")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_model_dir}")
    with pytest.raises(CirError, match=r"visual\.proj holds NaN"):
        lora.export_merged(model, tmp_path / "export", model_cfg=config, tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
