"""Prepared layers around the experts: the same answers, with adapters exchanged, and only weights that nobody else reads."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import PACKED, needs_onednn, pack_as, pretend_no_bfloat16_kernels
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from test_chat import EXPECTED, PROMPTS, config
from test_peft_part import make_dora
from test_switch import load, logits
from tiny import ARCHITECTURES, make_adapter, make_model, merged_float32, per_token, rel
from torch import nn

from llamafactory_kt import KTModelError, apply_adapter, prepare_for_inference, switch_adapter
from llamafactory_kt.decoding.lora_linear import FEW_ROWS, InferenceLora
from llamafactory_kt.decoding.prepare import prepare_layers
from llamafactory_kt.matmul.layouts import is_packed, unpack
from llamafactory_kt.matmul.linear import PreparedLinear
from llamafactory_kt.model import packing, prepared_layers, products

pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(prepared_layers, "SMALLEST", 0)


def names(model: nn.Module, only_packed: bool = False) -> set[str]:
    """Of the prepared layers, or of those whose weights are packed."""
    prepared = ((name, module) for name, module in model.named_modules() if isinstance(module, PreparedLinear))
    return {n.rpartition(".")[2] for n, m in prepared if is_packed(m.weight) or not only_packed}


@pytest.fixture
def all_packed(monkeypatch):
    """Every size that can be packed is."""
    monkeypatch.setattr(prepared_layers, "faster_packed", lambda sizes, sample: {s for s in sizes if packing.fits(s)})


@pytest.fixture(params=[*PACKED, "plain", "no kernels"])
def kind(request, monkeypatch):
    """How weights are computed with: packed, plain, or plain on a CPU without bfloat16 kernels."""
    if request.param in ("plain", "no kernels"):
        monkeypatch.setattr(prepared_layers, "faster_packed", lambda sizes, sample: set())
    else:
        request.getfixturevalue("all_packed")
        pack_as(monkeypatch, request.param)
    if request.param == "no kernels":
        pretend_no_bfloat16_kernels(monkeypatch)
        monkeypatch.setattr(products, "BLOCK", 50 * 96)
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


TURNS = 1 + packing._TURNS
SAMPLES = {size: [torch.ones(size, dtype=torch.bfloat16) for _ in range(2)] for size in [(64, 64), (128, 64), (32, 64)]}


def faster(*sizes: packing.Size) -> set[packing.Size]:
    return packing.faster_packed(sizes, lambda: SAMPLES)


@pytest.fixture(params=PACKED)
def timed(request, monkeypatch, tmp_path):
    """The weights whose products were timed; 64 rows are faster packed, 128 are not, and every fifth time is wrong."""
    pack_as(monkeypatch, request.param)
    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path))
    monkeypatch.setattr(packing, "_known", {})
    monkeypatch.setattr(packing, "SMALLEST", 2 * 64 * 64)
    called: list[tuple[int, ...]] = []

    def seconds(product, x, weight):
        plain = unpack(weight) if is_packed(weight) else weight
        called.append(tuple(plain.shape))
        product(x, weight)
        if not is_packed(weight):
            return 1.0
        return 9.0 if len(called) % 5 == 0 else {64: 0.9, 128: 1.1}[len(plain)]

    monkeypatch.setattr(packing, "_seconds", seconds)
    return called


def test_sizes_that_are_faster_packed(timed):
    """By the median over all samples and turns; each size is measured once, small ones not at all."""
    assert faster(*SAMPLES) == {(64, 64)} | ({(32, 64)} if packing.has_bfloat16_kernels() else set())
    assert set(timed) == {(64, 64), (128, 64)} and len(timed) == 2 * 2 * 2 * TURNS
    assert faster((128, 64)) == set() and len(timed) == 2 * 2 * 2 * TURNS


@pytest.mark.parametrize("damage", [None, "", "[]", '{"facts": 1, "measured": []}', "text"])
def test_measured_sizes_are_remembered(timed, damage, tmp_path, monkeypatch):
    """By later processes, together with those measured then, until they are to be forgotten or their file is damaged."""
    has_bfloat16_kernels = packing.has_bfloat16_kernels()
    assert faster((64, 64)) == {(64, 64)}
    (file,) = (tmp_path / "calibration").iterdir()
    if damage is not None:
        content = json.loads(file.read_text())
        content["measured"][0][3] = damage
        file.write_text(json.dumps(content) if damage.isalpha() else damage)
    once = 2 * 2 * TURNS
    until_now = once if damage is None else 2 * once
    for sizes, more in [([(64, 64)], 0), ([*SAMPLES], once), ([*SAMPLES], 0)]:
        packing._known.clear()
        assert (64, 64) in faster(*sizes)
        until_now += more
        assert len(timed) == until_now
    packing.forget_measured()
    faster(*SAMPLES)
    assert len(timed) == until_now + 2 * once
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    faster(*SAMPLES)
    assert len(timed) == until_now + 4 * once, "with other threads"
    assert packing._recalled()
    with monkeypatch.context() as switched:  # by ONEDNN_MAX_CPU_ISA
        switched.setattr(packing, "has_bfloat16_kernels", lambda: not has_bfloat16_kernels)
        assert packing._recalled() == {}, "those of another layout"
    packing.forget_measured()
    assert not [*(tmp_path / "calibration").iterdir()]


def lora_layer(**settings: object) -> tuple[nn.Module, nn.Module]:
    """A layer with two active adapters of different rank and scaling, in bfloat16 and in float32."""
    layer = nn.Sequential(nn.Linear(96, 160, dtype=torch.bfloat16))
    config = {"target_modules": ["0"], "inference_mode": True}
    model = PeftModel(layer, LoraConfig(r=5, lora_alpha=15, **config), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=3, lora_alpha=4, **config, **settings))
    model.base_model.set_adapter(["one", "two"], inference_mode=True)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=2)  # far above what rounding the sum to bfloat16 costs
    return model.eval(), copy.deepcopy(model).float()


@pytest.mark.parametrize("rows", [1, FEW_ROWS - 1, FEW_ROWS, 3 * FEW_ROWS])
@torch.inference_mode()
def test_lora_against_peft_in_float32(kind, rows):
    model, reference = lora_layer()
    prepare_layers(model)
    layer = model.base_model.model[0]
    assert type(layer.base_layer) is PreparedLinear and type(layer) is InferenceLora
    x = torch.randn(1, rows, 96).to(torch.bfloat16)

    def effect(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with model.disable_adapter():
            base = model(x)
        found = model(x)
        assert found.dtype == base.dtype
        return found.float() - base.float()

    wanted = effect(reference, x.float())
    assert (effect(model, x) - wanted).norm() < 0.01 * wanted.norm()
    model.base_model.set_adapter("two", inference_mode=True)
    reference.base_model.set_adapter("two", inference_mode=True)
    other = effect(reference, x.float())
    assert (effect(model, x) - other).norm() < 0.01 * other.norm() < 0.01 * (wanted - other).norm() * 2
    with pytest.raises(RuntimeError, match="kt_merge_adapter: true merges it"):
        model.merge_adapter()


def test_lora_moves_with_its_layer(monkeypatch):
    monkeypatch.setattr(prepared_layers, "SMALLEST", 2**20)
    model, _ = lora_layer()
    prepare_layers(model)
    layer = model.to("meta").base_model.model[0]
    assert {tensor.device.type for pairs in layer._pairs.values() for pair in pairs.values() for tensor in pair} == {
        "meta"
    }
    assert model(torch.empty(2, 96, dtype=torch.bfloat16, device="meta")).shape == (2, 160)


@pytest.mark.parametrize("kind", ["no kernels"], indirect=True)
@torch.inference_mode()
def test_lora_on_a_layer_that_is_not_prepared(kind, monkeypatch):
    """As it is too small: its own product takes bfloat16 only."""
    monkeypatch.setattr(prepared_layers, "SMALLEST", 2**20)
    model, reference = lora_layer()
    prepare_layers(model)
    layer = model.base_model.model[0]
    assert type(layer) is InferenceLora and type(layer.base_layer) is nn.Linear
    for rows in (1, FEW_ROWS):
        x = torch.randn(rows, 96).to(torch.bfloat16)
        assert rel(model(x), reference(x.float())) < 0.01


def test_lora_with_a_bias_is_left_to_peft():
    model, reference = lora_layer(lora_bias=True)
    x = torch.randn(2, FEW_ROWS, 96).to(torch.bfloat16)
    prepare_layers(model)
    assert type(model.base_model.model[0]) is Linear
    assert rel(model(x), reference(x.float())) < 0.01


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
    with prepared_layers.changing_layers(model, weights_are_read=True):
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
    monkeypatch.setattr(products, "has_bfloat16_kernels", lambda: True)  # the same product before and afterwards
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
    monkeypatch.setattr(prepared_layers, "SMALLEST", 64 * 64 * 2 + 1)
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    prepare_layers(model)
    assert type(model[0]) is nn.Linear


def test_prepared_from_python(tmp_path):
    """Through PEFT's wrapper, as apply_adapter gives it, with an adapter that is exchanged afterwards."""
    path = make_model(tmp_path / "model", "deepseek_v2")
    one = make_adapter(tmp_path / "one", path, rank=5, alpha=10)
    two = make_adapter(tmp_path / "two", path, rank=3, alpha=4, seed=2)
    model, _ = apply_adapter(load(path, "oneDNN", adapter=[str(one)]), one)
    assert not names(model)
    for _ in range(2):
        prepare_for_inference(model)
        assert names(model) >= {"base_layer", "lm_head"}
    for adapter in (one, two):
        switch_adapter(model, adapter)
        assert per_token(logits(model), logits(merged_float32(path, [adapter]))) < 0.03
    with (
        model.get_base_model()._kt_gate.generation(),
        pytest.raises(RuntimeError, match="cannot be changed from within a generation"),
    ):
        prepare_for_inference(model)
    with pytest.raises(KTModelError, match="Linear has no KT experts"):
        prepare_for_inference(nn.Linear(2, 2))


def test_a_chat_prepares(tmp_path, demo):
    """Through LLaMA-Factory, with the adapter, and again with the adapter merged."""
    from llamafactory.chat import ChatModel
    from yaml import safe_load

    adapter = str(demo / "adapter")
    for merged in (False, True):
        path = config(tmp_path, demo, kt_backend="oneDNN", adapter_name_or_path=adapter, kt_merge_adapter=merged)
        chat = ChatModel(safe_load(path.read_text()))
        assert names(chat.engine.model) >= {"lm_head", "o_proj" if merged else "base_layer"}
        said = [chat.chat([{"role": "user", "content": p}])[0].response_text for p in PROMPTS]
        assert said == [EXPECTED[p]["adapter"] for p in PROMPTS]
