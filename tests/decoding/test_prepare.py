"""Preparing the layers around the experts: the results stay the same, and weights stay the checkpoint's."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.adapters import make_adapter, make_dora
from helpers.loading import load, logits
from helpers.marks import needs_native
from helpers.models import ARCHITECTURES, make_model
from helpers.references import merged_float32, per_token, rel
from torch import nn

from llamafactory_kt import apply_adapter, optimize_for_inference, switch_adapter
from llamafactory_kt.decoding.native_linear import NativeLinear
from llamafactory_kt.decoding.prepare import prepare_layers
from llamafactory_kt.ground.paging import are_of_a_file

pytestmark = needs_native


def prepared_names(model: nn.Module) -> set[str]:
    """The last part of the names of prepared layers."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, NativeLinear)}


def plain_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_against_float32(bias, dtype):
    model = nn.Sequential(nn.Linear(96, 160, bias=bias, dtype=dtype))
    plain = nn.Linear(96, 160, bias=bias).requires_grad_(False)
    plain.load_state_dict(model[0].state_dict())
    prepare_layers(model, copy=True)
    assert type(model[0]) is NativeLinear and torch.equal(model[0].weight.float(), plain.weight), "bit by bit"
    hidden = torch.randn(2, 7, 96).to(dtype)
    for x in (hidden, hidden[:, -1:], hidden[0], hidden[0, 0], hidden[:, ::3], hidden[:, :0], hidden.transpose(0, 1)):
        found = model(x)
        assert found.dtype == dtype and found.shape == (*x.shape[:-1], 160)
        torch.testing.assert_close(found.float(), plain(x.float()), rtol=0.01, atol=0.01)


def test_gradients_and_other_devices_are_pytorchs():
    model = nn.Sequential(nn.Linear(8, 6))
    prepare_layers(model, copy=True)
    model(torch.ones(3, 8)).sum().backward()
    assert torch.equal(model[0].weight.grad, torch.full((6, 8), 3.0))
    x = torch.ones(3, 8, requires_grad=True)
    model.requires_grad_(False)(x).sum().backward()
    torch.testing.assert_close(x.grad[0], model[0].weight.sum(0))
    assert model.to("meta")(torch.empty(2, 8, device="meta")).shape == (2, 6)


@torch.no_grad()
def test_weights_that_are_exchanged_are_seen():
    """Whatever the call kept: another parameter, other data, another dtype, and values in place."""
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    prepare_layers(model, copy=True)
    x = torch.randn(3, 8)

    def check() -> None:
        weight, given = model[0].weight, x.to(model[0].weight.dtype)
        assert rel(model(given).float(), given.float() @ weight.float().T) < 0.01

    check()
    model[0].weight = nn.Parameter(torch.randn(6, 8))
    check()
    model[0].weight.data = torch.randn(6, 8)
    check()
    model[0].weight.mul_(-3)
    check()
    model.bfloat16()
    check()
    model.load_state_dict({"0.weight": torch.randn(6, 8)}, assign=True)
    check()
    other = copy.deepcopy(model)
    other[0].weight.zero_()
    check()
    assert not other(x).any(), "a copy has its own weights"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(tmp_path, architecture):
    path = make_model(tmp_path / "model", architecture)
    wanted = logits(merged_float32(path, []))
    model = load(path, "native")
    stock = per_token(logits(model), wanted)
    weights = plain_weights(model)
    optimize_for_inference(model)
    assert per_token(logits(model), wanted) < 2 * stock
    assert prepared_names(model) >= {"o_proj", "lm_head"}
    assert not any(type(module) is nn.Linear for module in model.model.layers[-1].self_attn.modules())
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in weights.items()), "bit by bit"


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_adapters_come_and_go(tmp_path, engine):
    path = make_model(tmp_path / "model", "deepseek_v2")
    one = make_adapter(tmp_path / "one", path, rank=5, alpha=10)
    two = make_adapter(tmp_path / "two", path, rank=3, alpha=4, seed=2)
    wanted = {key: logits(merged_float32(path, list(key))) for key in [(), (one,), (two,)]}
    model, _ = apply_adapter(load(path, engine, adapter=[str(one)]), one)
    optimize_for_inference(model)
    assert per_token(logits(model), wanted[one,]) < 0.03
    for adapter in (two, None, one):
        switch_adapter(model, adapter)
        assert per_token(logits(model), wanted[(adapter,) if adapter else ()]) < 0.03
    assert per_token(wanted[one,], wanted[()]) > 0.2


@torch.inference_mode()
def test_adapters_that_read_the_weights(tmp_path):
    """DoRA and a trained output layer, switched to LoRA and back: PEFT computes DoRA, and the weights are what they were."""
    path = make_model(tmp_path / "model", "deepseek_v2")
    lora = make_adapter(tmp_path / "lora", path, rank=5, alpha=10)
    wanted = {"dora": logits(make_dora(tmp_path / "dora", path)), "lora": logits(merged_float32(path, [lora]))}
    base = load(path, "native", adapter=[str(lora)])
    plain = plain_weights(base)
    optimize_for_inference(base)
    every = prepared_names(base)
    model, _ = apply_adapter(base, tmp_path / "dora")
    for name in ("dora", "lora", "dora", "lora", "dora"):
        switch_adapter(model, tmp_path / name)
        assert per_token(logits(model), wanted[name]) < 0.03
        assert "base_layer" in prepared_names(model)
    switch_adapter(model, None)
    assert prepared_names(model) == every
    found = model.get_base_model()
    assert all(torch.equal(found.get_submodule(n).weight, w) for n, w in plain.items()), "bit by bit"
    assert per_token(wanted["dora"], wanted["lora"]) > 0.2


@pytest.mark.parametrize("how", ["copy", "mmap"])
def test_weights_are_placed_once(tmp_path, how):
    """In huge pages, or where the file is mapped; switching adapters leaves them there."""
    path = make_model(tmp_path / "model", "deepseek_v2", hidden_size=512, num_attention_heads=8, num_key_value_heads=8)
    lora = make_adapter(tmp_path / "lora", path, rank=5, alpha=10)
    model = load(path, "native", adapter=[str(lora)], load=how)
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    plain = plain_weights(model)
    assert all(are_of_a_file(layer.weight) for layer in layers)
    optimize_for_inference(model)
    assert all(are_of_a_file(layer.weight) is (how == "mmap") for layer in layers)
    addresses = [layer.weight.data_ptr() for layer in layers]
    apply_adapter(model, lora)
    switch_adapter(model, None)
    optimize_for_inference(model)
    assert [layer.weight.data_ptr() for layer in layers] == addresses
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in plain.items())


def test_what_two_layers_share_stays_shared(tmp_path):
    path = make_model(tmp_path / "model", "qwen3_moe", tie_word_embeddings=True)
    model = load(path, "native")
    wanted = logits(model)
    optimize_for_inference(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and type(model.lm_head) is NativeLinear
    assert per_token(logits(model), wanted) < 0.02


def test_other_types_and_subclasses_are_left():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.float64), Own(64, 64))
    prepare_layers(model, copy=True)
    assert [type(layer) for layer in model] == [nn.Linear, Own]


def test_a_plain_weight_that_is_shown_elsewhere_keeps_its_values(tmp_path):
    """The pages of a file are dropped after they were copied; whoever still shows them reads them again."""
    path = make_model(tmp_path / "model", "qwen3_moe", hidden_size=512)
    model = load(path, "native", load="copy")
    kept = model.state_dict()
    wanted = {name: value.clone() for name, value in kept.items()}
    optimize_for_inference(model)
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


def test_a_weight_that_was_changed_is_not_a_files(tmp_path):
    """Its pages are the process's own since it was written to, and are not dropped."""
    path = make_model(tmp_path / "model", "qwen3_moe", hidden_size=512)
    model = load(path, "native", load="copy")
    weight = model.lm_head.weight
    with torch.no_grad():
        weight[3] = 2
    wanted = weight.clone()
    optimize_for_inference(model)
    assert torch.equal(model.lm_head.weight, wanted) and torch.equal(weight, wanted)
