"""Layers around the experts that are prepared for decoding: the same results, and only weights that nobody else reads."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import make_adapter, make_dora
from helpers.loading import load, logits
from helpers.marks import needs_onednn
from helpers.models import ARCHITECTURES, make_model
from helpers.packing import PACKED, pack_as, pretend_no_bfloat16_kernels
from helpers.references import merged_float32, per_token
from torch import nn

from llamafactory_kt import apply_adapter, switch_adapter
from llamafactory_kt.decoding import prepare
from llamafactory_kt.decoding.prepare import prepare_layers
from llamafactory_kt.matmul import layouts, linear
from llamafactory_kt.matmul.layouts import is_packed, unpack
from llamafactory_kt.matmul.linear import PreparedLinear

pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(prepare, "SMALLEST", 0)


def names(model: nn.Module, only_packed: bool = False) -> set[str]:
    """Of the prepared layers, or of those whose weights are packed."""
    prepared = ((name, module) for name, module in model.named_modules() if isinstance(module, PreparedLinear))
    return {n.rpartition(".")[2] for n, m in prepared if is_packed(m.weight) or not only_packed}


@pytest.fixture
def all_packed(monkeypatch):
    """Every size that can be packed is."""
    monkeypatch.setattr(prepare, "faster_packed", lambda sizes, sample: {s for s in sizes if layouts.fits(s)})


@pytest.fixture(params=[*PACKED, "plain", "no kernels"])
def kind(request, monkeypatch):
    """How weights are computed with: packed, plain, or plain on a CPU without bfloat16 kernels."""
    if request.param in ("plain", "no kernels"):
        monkeypatch.setattr(prepare, "faster_packed", lambda sizes, sample: set())
    else:
        request.getfixturevalue("all_packed")
        pack_as(monkeypatch, request.param)
    if request.param == "no kernels":
        pretend_no_bfloat16_kernels(monkeypatch)
        monkeypatch.setattr(linear, "BLOCK", 50 * 96)
    return request.param


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
    """Routers are left alone, whose weights some models read themselves; all else is prepared."""
    pack_as(monkeypatch, packed)
    path = make_model(tmp_path / "model", architecture)
    wanted = logits(merged_float32(path, []))
    model = load(path, "oneDNN")
    stock = per_token(logits(model), wanted)
    prepare_layers(model)
    assert per_token(logits(model), wanted) < 2 * stock
    assert names(model, only_packed=True) >= {"o_proj", "lm_head"}
    assert not names(model) & {"gate", "shared_expert_gate"}
    assert not any(type(module) is nn.Linear for module in model.model.layers[-1].self_attn.modules())


def test_adapters_come_and_go(tmp_path):
    path = make_model(tmp_path / "model", "deepseek_v2")
    one = make_adapter(tmp_path / "one", path, rank=5, alpha=10)
    two = make_adapter(tmp_path / "two", path, rank=3, alpha=4, seed=2)
    wanted = {key: logits(merged_float32(path, list(key))) for key in [(), (one,), (two,)]}
    model, _ = apply_adapter(load(path, "oneDNN", adapter=[str(one)]), one)
    prepare_layers(model)
    assert per_token(logits(model), wanted[one,]) < 0.03
    for adapter in (two, None, one):
        switch_adapter(model, adapter)
        assert per_token(logits(model), wanted[(adapter,) if adapter else ()]) < 0.03
    assert per_token(wanted[one,], wanted[()]) > 0.2


@pytest.mark.parametrize("packed", PACKED)
@torch.inference_mode()
def test_adapters_that_read_the_weights(tmp_path, monkeypatch, all_packed, packed):
    """DoRA and a trained head, exchanged for LoRA and back; what DoRA reads is not packed while it is there."""
    pack_as(monkeypatch, packed)
    path = make_model(tmp_path / "model", "deepseek_v2")
    wanted = logits(make_dora(tmp_path / "dora", path))
    lora = make_adapter(tmp_path / "lora", path, rank=5, alpha=10)
    base = load(path, "oneDNN", adapter=[str(lora)])
    plain = {n: m.weight.clone() for n, m in base.named_modules() if type(m) is nn.Linear}
    prepare_layers(base)
    every = names(base, only_packed=True)
    model, _ = apply_adapter(base, tmp_path / "dora")
    for _ in range(2):
        assert per_token(logits(model), wanted) < 0.03
        assert "down_proj" in names(model, only_packed=True) and "base_layer" not in names(model, only_packed=True)
        switch_adapter(model, lora)
        assert "base_layer" in names(model, only_packed=True)
        switch_adapter(model, tmp_path / "dora")
    switch_adapter(model, None)
    assert names(model, only_packed=True) == every
    with prepare.changing_layers(model, weights_are_read=True):
        assert not names(model, only_packed=True)
        found = model.get_base_model()
        assert all(torch.equal(found.get_submodule(n).weight, w) for n, w in plain.items()), "bit by bit"


@pytest.mark.parametrize("kind", ["plain", "no kernels"], indirect=True)
@torch.inference_mode()
def test_adapters_that_read_plain_weights(tmp_path, kind):
    path = make_model(tmp_path / "model", "deepseek_v2")
    lora = make_adapter(tmp_path / "lora", path, rank=5, alpha=10)
    wanted = {"dora": logits(make_dora(tmp_path / "dora", path)), "lora": logits(merged_float32(path, [lora]))}
    base = load(path, "oneDNN", adapter=[str(lora)])
    prepare_layers(base)
    model, _ = apply_adapter(base, tmp_path / "dora")
    for name in ("dora", "lora", "dora"):
        switch_adapter(model, tmp_path / name)
        assert per_token(logits(model), wanted[name]) < 0.03
    assert per_token(wanted["dora"], wanted["lora"]) > 0.2


@pytest.mark.parametrize("kind", ["plain"], indirect=True)
def test_plain_weights_are_placed_once(tmp_path, kind, monkeypatch):
    """In one block for each size, where an exchange of adapters leaves them."""
    path = make_model(tmp_path / "model", "deepseek_v2")
    lora = make_adapter(tmp_path / "lora", path, rank=5, alpha=10)
    model = load(path, "oneDNN", adapter=[str(lora)])
    monkeypatch.setattr(linear, "has_bfloat16_kernels", lambda: True)  # the same product before and afterwards
    wanted = logits(model)
    layers = [layer.self_attn.o_proj for layer in model.model.layers]
    prepare_layers(model)
    assert torch.equal(logits(model), wanted) and not names(model, only_packed=True)
    addresses = [layer.weight.data_ptr() for layer in layers]
    size = layers[0].weight.nbytes
    assert addresses == list(range(addresses[0], addresses[0] + len(layers) * size, size))
    apply_adapter(model, lora)
    switch_adapter(model, None)
    assert [layer.weight.data_ptr() for layer in layers] == addresses


def test_what_two_layers_share_is_left(tmp_path):
    path = make_model(tmp_path / "model", "qwen3_moe", tie_word_embeddings=True)
    model = load(path, "oneDNN")
    prepare_layers(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight


def test_other_types_and_small_weights_are_left(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, dtype=torch.float16))
    prepare_layers(model)
    assert {type(layer) for layer in model} == {nn.Linear}
    monkeypatch.setattr(prepare, "SMALLEST", 64 * 64 * 2 + 1)
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    prepare_layers(model)
    assert type(model[0]) is nn.Linear
