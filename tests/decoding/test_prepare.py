"""Preparing the layers around the experts: the results stay the same, and weights that others read are left alone."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import make_adapter, make_dora
from helpers.loading import load, logits
from helpers.marks import needs_onednn
from helpers.models import ARCHITECTURES, make_model
from helpers.packing import PACKED, pack_as, prepared_names
from helpers.references import merged_float32, per_token
from torch import nn

from llamafactory_kt import apply_adapter, optimize_for_inference, switch_adapter
from llamafactory_kt.decoding import prepare
from llamafactory_kt.decoding.prepare import prepare_layers
from llamafactory_kt.matmul import linear
from llamafactory_kt.matmul.layouts import is_packed, unpack
from llamafactory_kt.matmul.linear import PreparedLinear

pytestmark = [needs_onednn, pytest.mark.usefixtures("every_size")]


@pytest.mark.parametrize("bias", [True, False])
def test_against_float32(bias, kind):
    model = nn.Sequential(nn.Linear(96, 160, bias=bias, dtype=torch.bfloat16))
    plain = nn.Linear(96, 160, bias=bias).requires_grad_(False)
    plain.load_state_dict(model[0].state_dict())
    prepare_layers(model)
    assert type(model[0]) is PreparedLinear and is_packed(model[0].weight) is (kind not in ("plain", "no kernels"))
    whole = unpack(model[0].weight) if is_packed(model[0].weight) else model[0].weight
    assert torch.equal(whole.float(), plain.weight), "bit by bit"
    assert model[0].weight.dtype == torch.bfloat16 and not model[0].weight.requires_grad
    hidden = torch.randn(2, 7, 96).to(torch.bfloat16)
    for x in (hidden, hidden[:, -1:], hidden[0], hidden[0, 0], hidden[:, ::3], hidden[:, :0]):
        found = model(x)
        assert found.dtype == torch.bfloat16 and found.shape == (*x.shape[:-1], 160)
        torch.testing.assert_close(found.float(), plain(x.float()), rtol=0.01, atol=0.01)
    with pytest.raises(RuntimeError, match=r"expected bfloat16, got torch\.float32"):
        model(hidden[:1, :1].float())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("packed", PACKED)
def test_every_architecture(tmp_path, architecture, packed, monkeypatch, all_packed):
    """Everything is prepared but the routers, whose weights some models read themselves."""
    pack_as(monkeypatch, packed)
    path = make_model(tmp_path / "model", architecture)
    wanted = logits(merged_float32(path, []))
    model = load(path, "oneDNN")
    stock = per_token(logits(model), wanted)
    optimize_for_inference(model)
    assert per_token(logits(model), wanted) < 2 * stock
    assert prepared_names(model, only_packed=True) >= {"o_proj", "lm_head"}
    assert not prepared_names(model) & {"gate", "shared_expert_gate"}
    assert not any(type(module) is nn.Linear for module in model.model.layers[-1].self_attn.modules())


def test_adapters_come_and_go(tmp_path):
    path = make_model(tmp_path / "model", "deepseek_v2")
    one = make_adapter(tmp_path / "one", path, rank=5, alpha=10)
    two = make_adapter(tmp_path / "two", path, rank=3, alpha=4, seed=2)
    wanted = {key: logits(merged_float32(path, list(key))) for key in [(), (one,), (two,)]}
    model, _ = apply_adapter(load(path, "oneDNN", adapter=[str(one)]), one)
    optimize_for_inference(model)
    assert per_token(logits(model), wanted[one,]) < 0.03
    for adapter in (two, None, one):
        switch_adapter(model, adapter)
        assert per_token(logits(model), wanted[(adapter,) if adapter else ()]) < 0.03
    assert per_token(wanted[one,], wanted[()]) > 0.2


@pytest.mark.parametrize("packed", PACKED)
@torch.inference_mode()
def test_adapters_that_read_the_weights(tmp_path, monkeypatch, all_packed, packed):
    """DoRA and a trained output layer, switched to LoRA and back; what DoRA reads is not packed as long as it is there."""
    pack_as(monkeypatch, packed)
    path = make_model(tmp_path / "model", "deepseek_v2")
    wanted = logits(make_dora(tmp_path / "dora", path))
    lora = make_adapter(tmp_path / "lora", path, rank=5, alpha=10)
    base = load(path, "oneDNN", adapter=[str(lora)])
    plain = {n: m.weight.clone() for n, m in base.named_modules() if type(m) is nn.Linear}
    optimize_for_inference(base)
    every = prepared_names(base, only_packed=True)
    model, _ = apply_adapter(base, tmp_path / "dora")
    for _ in range(2):
        assert per_token(logits(model), wanted) < 0.03
        packed_now = prepared_names(model, only_packed=True)
        assert "down_proj" in packed_now and "base_layer" not in packed_now
        switch_adapter(model, lora)
        assert "base_layer" in prepared_names(model, only_packed=True)
        switch_adapter(model, tmp_path / "dora")
    switch_adapter(model, None)
    assert prepared_names(model, only_packed=True) == every
    with prepare.changing_layers(model, prepared=True, weights_are_read=True):
        assert not prepared_names(model, only_packed=True)
        found = model.get_base_model()
        assert all(torch.equal(found.get_submodule(n).weight, w) for n, w in plain.items()), "bit by bit"


@pytest.mark.parametrize("kind", ["plain", "no kernels"], indirect=True)
@torch.inference_mode()
def test_adapters_that_read_plain_weights(tmp_path, kind):
    path = make_model(tmp_path / "model", "deepseek_v2")
    lora = make_adapter(tmp_path / "lora", path, rank=5, alpha=10)
    wanted = {"dora": logits(make_dora(tmp_path / "dora", path)), "lora": logits(merged_float32(path, [lora]))}
    base = load(path, "oneDNN", adapter=[str(lora)])
    optimize_for_inference(base)
    model, _ = apply_adapter(base, tmp_path / "dora")
    for name in ("dora", "lora", "dora"):
        switch_adapter(model, tmp_path / name)
        assert per_token(logits(model), wanted[name]) < 0.03
    assert per_token(wanted["dora"], wanted["lora"]) > 0.2


@pytest.mark.parametrize("kind", ["plain"], indirect=True)
def test_plain_weights_are_placed_once(tmp_path, kind, monkeypatch):
    """In one block for each size, where switching adapters leaves them."""
    path = make_model(tmp_path / "model", "deepseek_v2")
    lora = make_adapter(tmp_path / "lora", path, rank=5, alpha=10)
    model = load(path, "oneDNN", adapter=[str(lora)])
    monkeypatch.setattr(linear, "has_bfloat16_kernels", lambda: True)  # the same product before and afterwards
    wanted = logits(model)
    layers = [layer.self_attn.o_proj for layer in model.model.layers]
    prepare_layers(model)
    assert torch.equal(logits(model), wanted) and not prepared_names(model, only_packed=True)
    optimize_for_inference(model)  # from now on, layers are prepared again after each change
    addresses = [layer.weight.data_ptr() for layer in layers]
    size = layers[0].weight.nbytes
    assert addresses == list(range(addresses[0], addresses[0] + len(layers) * size, size))
    apply_adapter(model, lora)
    switch_adapter(model, None)
    assert [layer.weight.data_ptr() for layer in layers] == addresses


def test_what_two_layers_share_is_left(tmp_path):
    path = make_model(tmp_path / "model", "qwen3_moe", tie_word_embeddings=True)
    model = load(path, "oneDNN")
    optimize_for_inference(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight


def test_other_types_and_small_weights_are_left(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, dtype=torch.float16))
    prepare_layers(model)
    assert {type(layer) for layer in model} == {nn.Linear}
    monkeypatch.setattr(prepare, "SMALLEST", 64 * 64 * 2 + 1)
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    prepare_layers(model)
    assert type(model[0]) is nn.Linear
