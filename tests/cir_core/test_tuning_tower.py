"""The image tower in training: the same function with nothing computed or kept in vain, and patch dropout."""

from __future__ import annotations

import copy
import json

import open_clip
import pytest
import torch
from torch import nn

from cir_core.encoders import load_encoder
from cir_core.lora import attach_lora, export_merged, last_block_for_class_token
from cir_core.schema import CirError
from cir_core.tuning import TextAnchoredTuner, TuningSettings
from cir_core.tuning.quick_gelu import LeanQuickGELU
from cir_core.tuning.saved_tensors import SavedTensors

ROWS = 5


def encoder_with(folder, *targets, dropout=0.0):
    torch.manual_seed(0)
    encoder = load_encoder(f"local-dir:{folder}", device="cpu")
    attach_lora(encoder.model, r=4, lora_alpha=4, lora_dropout=dropout, target_modules=targets or ("q_proj", "v_proj"))
    with torch.no_grad():
        for name, parameter in encoder.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return encoder


def pictures(rows=ROWS, size=32):
    return torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def tower_of(encoder):
    return encoder.model.visual.get_base_model()


def run_tower(visual, pixels):
    """Return outputs and gradients."""
    out = visual(pixels)
    out.backward(torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape))
    return {"out": out.detach(), **{name: p.grad for name, p in visual.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj")]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_block_gives_the_class_token_alone(tiny_model_dir, targets, checkpointing):
    encoder = encoder_with(tiny_model_dir, *targets)
    plain = copy.deepcopy(encoder.model.visual).double()
    cut = copy.deepcopy(plain)
    assert last_block_for_class_token(cut)
    cut.set_grad_checkpointing(checkpointing)
    assert cut.state_dict().keys() == plain.state_dict().keys()
    pixels = encoder.normalize(pictures()).double()
    rows = []
    cut.get_base_model().transformer.resblocks[-1].mlp.register_forward_hook(lambda m, i, o: rows.append(o.shape[1]))
    expected, found = run_tower(plain, pixels), run_tower(cut, pixels)
    assert set(rows) == {1}
    for name, value in expected.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(found[name], value, atol=1e-12, rtol=1e-10)


def test_a_tower_that_reads_all_rows_stays_as_it_is(make_tiny_model_dir, tmp_path):
    averaged = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8, "pool_type": "avg"}
    folder = make_tiny_model_dir(tmp_path / "avg", vision_cfg=averaged)
    encoder = load_encoder(f"local-dir:{folder}", device="cpu")
    before = str(encoder.model.visual)
    assert not last_block_for_class_token(encoder.model.visual)
    assert str(encoder.model.visual) == before
    assert not last_block_for_class_token(nn.Linear(2, 2))


def test_quick_gelu_is_open_clips_and_keeps_its_input_alone():
    values = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    leaves = [values.clone().requires_grad_() for _ in range(2)]
    outs = [module(x) for module, x in zip((open_clip.transformer.QuickGELU(), LeanQuickGELU()), leaves, strict=True)]
    assert torch.equal(*outs)
    for out in outs:
        out.backward(torch.cos(values))
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-14, rtol=1e-12)
    with SavedTensors() as saved:
        LeanQuickGELU()(leaves[0])
    assert saved.peak_bytes == values.nbytes
    assert torch.autograd.gradcheck(LeanQuickGELU(), leaves[1][::400].detach().requires_grad_())


def test_training_uses_the_lean_activation(make_tiny_model_dir, tmp_path):
    folder = make_tiny_model_dir(tmp_path / "quick", quick_gelu=True)
    encoder = encoder_with(folder)
    before = encoder.encode_images(pictures())
    TextAnchoredTuner(encoder, TuningSettings(total_steps=1))
    activations = [type(block.mlp.gelu) for block in tower_of(encoder).transformer.resblocks]
    assert activations == [LeanQuickGELU, LeanQuickGELU]
    torch.testing.assert_close(encoder.encode_images(pictures()), before, atol=1e-6, rtol=1e-5)


class WhereKept:
    """The modules of a model in whose forward something is kept for the backward pass, and whether gradients were on."""

    def __init__(self, model, ignored):
        self.running, self.kept, self.graph_in = [""], set(), set()
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, a, name=name: self.running.append(name))
            module.register_forward_hook(self._end)

    def _end(self, module, arguments, out):
        name = self.running.pop()
        if isinstance(out, torch.Tensor) and out.requires_grad:
            self.graph_in.add(name)

    def pack(self, tensor):
        if tensor.untyped_storage().data_ptr() not in self._ignored:
            self.kept.add(self.running[-1])
        return tensor


def one_backward(encoder, texts, **settings):
    tuner = TextAnchoredTuner(encoder, TuningSettings(total_steps=1, **settings))
    tuner.tower.train()
    where = WhereKept(encoder.model, encoder.model.parameters())
    encode = encoder.model.encode_text

    def encode_text(*arguments, **named):  # not a forward of the model as a whole
        where.running.append("text tower")
        out = encode(*arguments, **named)
        where.running.pop()
        assert not out.requires_grad
        return out

    encoder.model.encode_text = encode_text
    with torch.autograd.graph.saved_tensors_hooks(where.pack, lambda tensor: tensor):
        tuner.backward(0, pictures(), texts, torch.ones(ROWS, dtype=torch.bool))
    return where


TEXTS = ["a red circle", "a blue square", "a green star", "two small rings", "a large cross"]


@pytest.mark.parametrize("size", [0, 2])
def test_nothing_is_kept_below_the_first_adapted_layer(tiny_model_dir, size):
    """Block 1 alone is adapted: no graph in the text tower, the patches, ln_pre and block 0; none in block 1's ln_1."""
    target = "transformer.resblocks.1.attn.q_proj"
    where = one_backward(encoder_with(tiny_model_dir, target, dropout=0.1), TEXTS, micro_batch_size=size)
    tower = "visual.base_model.model"
    adapted = f"{tower}.transformer.resblocks.1"
    never = tuple(f"{tower}.{name}" for name in ("conv1", "ln_pre", "patch_dropout", "transformer.resblocks.0"))
    never += tuple(f"{adapted}.{name}" for name in ("ln_1", "attn.k_proj", "attn.v_proj"))
    never += ("text tower", "transformer", "token_embedding", "ln_final")  # a name of CLIP's own is the text tower's
    for found in (where.kept, where.graph_in):
        assert {f"{adapted}.attn.q_proj", f"{adapted}.ln_2", f"{tower}.ln_post"} <= found
        assert [name for name in found if name.startswith(never)] == []


def test_frozen_layers_above_keep_only_what_their_inputs_gradient_needs(tiny_model_dir):
    """A frozen Linear's input gradient needs its weight alone: no activation is kept for the weight's."""
    where = one_backward(encoder_with(tiny_model_dir), TEXTS)
    linear = [name for name in where.kept if name.endswith(("c_fc", "c_proj", "out_proj", "k_proj"))]
    assert linear == []
    assert any(name.endswith("ln_2") for name in where.kept)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_model_tuned_in_the_changed_tower_is_exported_as_open_clips_own(tiny_model_dir, tmp_path, share):
    encoder = encoder_with(tiny_model_dir, dropout=0.1)
    tuner = TextAnchoredTuner(encoder, TuningSettings(total_steps=2, lr=1e-2, patch_dropout=share))
    for index in range(2):
        tuner.step(index, pictures(), TEXTS, torch.ones(ROWS, dtype=torch.bool))
    expected = encoder.encode_images(pictures())
    assert torch.equal(encoder.encode_images(pictures()), expected)
    export_merged(encoder.model, tmp_path / "m", model_cfg=encoder.model_cfg, tokenizer=encoder.tokenizer)
    model = open_clip.create_model(f"local-dir:{tmp_path / 'm'}").eval()
    with torch.no_grad():
        found = model.encode_image(encoder.normalize(pictures()), normalize=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def patches_seen(tower):
    seen = []
    tower.ln_pre.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    return seen


def test_patch_dropout_leaves_out_its_share_in_training_alone(tiny_model_dir):
    """16 patches and the class token; what is left out is a matter of the step, and of both passes alike."""
    encoder = encoder_with(tiny_model_dir)
    settings = TuningSettings(total_steps=2, patch_dropout=0.75, micro_batch_size=2)
    tuner = TextAnchoredTuner(encoder, settings)
    seen = patches_seen(tower_of(encoder))
    anchors, valid = encoder.encode_texts(TEXTS), torch.ones(ROWS, dtype=torch.bool)
    before = encoder.encode_images(pictures())
    assert seen == [17]
    tuner.tower.train()
    losses = [tuner.backward(index, pictures(), anchors, valid).item() for index in (0, 0, 1)]
    assert set(seen[1:]) == {5}
    assert losses[0] == losses[1] != losses[2]
    tuner.tower.eval()
    assert torch.equal(encoder.encode_images(pictures()), before)
    whole = TextAnchoredTuner(encoder_with(tiny_model_dir), TuningSettings(total_steps=2, patch_dropout=0.75))
    whole.tower.train()
    parts = []
    for first in (0, 2, 4):
        torch.manual_seed(hash((0, 0, 0, first) if first else (0, 0, 0)) & 0x7FFFFFFF)
        parts.append(whole.tower(whole.encoder.normalize(pictures()[first : first + 2])))
    loss = whole._loss_of(torch.cat(parts), anchors, valid)
    assert loss.item() == pytest.approx(losses[0], abs=1e-6)


def test_patch_dropout_is_off_unless_it_is_asked_for(make_tiny_model_dir, tmp_path):
    folder = make_tiny_model_dir(tmp_path / "model")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["patch_dropout"] = 0.5
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    encoder = encoder_with(folder)
    seen = patches_seen(tower_of(encoder))
    tuner = TextAnchoredTuner(encoder, TuningSettings(total_steps=1))
    tuner.step(0, pictures(), TEXTS, torch.ones(ROWS, dtype=torch.bool))
    assert set(seen) == {17}


def test_patch_dropout_for_a_tower_without_it_is_refused(make_tiny_model_dir, tmp_path):
    encoder = load_encoder(f"local-dir:{make_tiny_model_dir(tmp_path / 'timm', vision='timm')}", device="cpu")
    attach_lora(encoder.model, target_modules=("q_proj",))
    with pytest.raises(CirError, match=r"patch_dropout 0.5 needs open_clip's VisionTransformer.*TimmModel"):
        TextAnchoredTuner(encoder, TuningSettings(total_steps=1, patch_dropout=0.5))
    TextAnchoredTuner(encoder, TuningSettings(total_steps=1))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_patches_out_of_range_is_refused(tiny_model_dir, share):
    with pytest.raises(CirError, match=r"patch_dropout must be in \[0, 1\)"):
        TextAnchoredTuner(encoder_with(tiny_model_dir), TuningSettings(total_steps=1, patch_dropout=share))
