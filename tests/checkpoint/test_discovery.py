"""Which models have experts that KT can compute, and why others are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import image_text
from helpers.models import ARCHITECTURES
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from llamafactory_kt import KTModelError
from llamafactory_kt.adapters.fused_layout import FusedLayout
from llamafactory_kt.checkpoint.discovery import find_experts


def empty(architecture, **keys):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **keys))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_accepted(name):
    modules = find_experts(empty(name, **ARCHITECTURES[name]))
    first = 1 if "first_k_dense_replace" in ARCHITECTURES[name] else 0
    assert [m.layer for m in modules] == list(range(first, 3))
    assert all(m.num_experts_per_tok == 3 and m.shape.num_experts == 6 for m in modules)


def test_layers_that_are_not_moe():
    keys = {**ARCHITECTURES["qwen3_moe"], "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert [m.layer for m in find_experts(empty("qwen3_moe", **keys))] == [1, 5]


SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
PLAIN = "down(silu(gate x) * up x)"
COMPUTED = [
    ("qwen3_moe", ARCHITECTURES["qwen3_moe"], PLAIN, FusedLayout()),
    ("qwen3_moe", {**ARCHITECTURES["qwen3_moe"], "hidden_act": "gelu"}, "down(gelu(gate x) * up x)", FusedLayout()),
    ("qwen3_moe", {**ARCHITECTURES["qwen3_moe"], "hidden_act": "relu"}, "down(relu(gate x) * up x)", FusedLayout()),
    (
        "qwen3_moe", {**ARCHITECTURES["qwen3_moe"], "hidden_act": "quick_gelu"},
        "down(silu(gate x, alpha 1.702) * up x)", FusedLayout(),
    ),
    (
        "gpt_oss", {**SMALL, "num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 32},
        "down(silu(min(gate x, 7), alpha 1.702) * (clamp(up x, ±7) + 1)) with biases",
        FusedLayout(transposed=True, interleaved=True),
    ),
    ("nemotron_h", {}, "down(relu2(up x))", FusedLayout()),
    ("llama4_text", {**SMALL, "num_local_experts": 4}, PLAIN, FusedLayout(transposed=True)),
    (
        "gemma4_text",
        {**SMALL, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        "down(gelu_tanh(gate x) * up x)", FusedLayout(),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "formula", "layout"), COMPUTED)
def test_what_experts_compute_is_learnt(name, keys, formula, layout):
    module = find_experts(empty(name, **keys))[0]
    assert (str(module.formula), module.shape.fused, module.presorted) == (formula, layout, name == "llama4_text")


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("llama", SMALL, "LlamaForCausalLM has no routed experts"),
        (
            "qwen3_moe",
            {**ARCHITECTURES["qwen3_moe"], "hidden_act": "mish"},
            "they do not compute down(f(gate x) * up x)",
        ),
        ("longcat_flash", {}, "does not go with down_proj"),
        (
            "qwen3_moe",
            {**ARCHITECTURES["qwen3_moe"], "num_experts_per_tok": 7},
            "config.json asks for 7 experts per token, and model.layers.0.mlp.experts has 6",
        ),
        ("llama4_text", {**SMALL, "num_local_experts": 2, "num_experts_per_tok": 3}, "asks for 3 experts per token"),
    ],
)
def test_refused_with_the_reason(name, keys, message):
    with pytest.raises(KTModelError) as error:
        find_experts(empty(name, **keys))
    assert message in str(error.value)


def plain(self, x, index, scores, activated=None):
    gate, up = (self.gate_up_proj[index] @ x[:, None, :, None])[..., 0].chunk(2, dim=-1)
    found = activated(gate, up) if activated else F.silu(gate) * up
    return (scores[..., None] * (self.down_proj[index] @ found[..., None])[..., 0]).sum(1)


def with_forward(monkeypatch, forward):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    monkeypatch.setattr(Qwen3MoeExperts, "forward", forward)
    return find_experts(empty("qwen3_moe", **ARCHITECTURES["qwen3_moe"]))[0].formula


@pytest.mark.parametrize(
    ("activated", "formula"),
    [
        (None, PLAIN),
        (lambda g, u: F.silu(g.clamp(max=10)) * u.clamp(-10, 10), "down(silu(min(gate x, 10)) * clamp(up x, ±10))"),
        (lambda g, u: F.silu(g).clamp(max=7) * u.clamp(-7, 7), "down(min(silu(gate x), 7) * clamp(up x, ±7))"),
        (lambda g, u: g * torch.sigmoid(1.5 * g) * (u + 1), "down(silu(gate x, alpha 1.5) * (up x + 1))"),
        (lambda g, u: (F.silu(g.float()) * u.float()).to(g.dtype), PLAIN),  # transformers' Beam computes it in float32
    ],
)
def test_numbers_are_learnt_from_the_forward(monkeypatch, activated, formula):
    def forward(self, x, index, scores):
        return plain(self, x, index, scores, activated)

    assert str(with_forward(monkeypatch, forward)) == formula


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x, index, scores: plain(self, x.clamp(max=1.0), index, scores),
        lambda self, x, index, scores: plain(self, x, index, scores.square()),
        lambda self, x, index, scores: plain(
            self, x, index, scores, lambda g, u: F.silu(g).clamp(max=7) * u.clamp(-5, 5)
        ),
        lambda self, x, index, scores: plain(self, x, index, scores, lambda g, u: F.silu(g.clamp(max=500)) * u),
        lambda self, x, index, scores: plain(self, x * scores[:, :1], index, scores),
    ],
)
def test_experts_that_compute_something_else_are_found_out(monkeypatch, forward):
    with pytest.raises(KTModelError, match="they do not compute"):
        with_forward(monkeypatch, forward)


def test_experts_with_weights_of_their_own_are_refused():
    model = empty("qwen3_moe", **ARCHITECTURES["qwen3_moe"])
    model.model.layers[1].mlp.experts.norm = torch.nn.LayerNorm(72)
    with pytest.raises(
        KTModelError, match=r"they have weights that the contract does not know: norm\.bias, norm\.weight"
    ):
        find_experts(model)


def test_experts_of_a_vision_tower_stay_transformers_own():
    """As in dots.note."""
    with torch.device("meta"):
        parts = image_text.ARCHITECTURES["qwen3_vl_moe"]
        config = {"text_config": parts.text_config(), "vision_config": parts.vision_config()}
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen3_vl_moe", **config))
    experts = model.model.language_model.layers[0].mlp.experts
    model.model.visual.blocks[0].mlp.experts = copy.deepcopy(experts)
    assert [m.name for m in find_experts(model)] == [f"model.language_model.layers.{n}.mlp.experts" for n in range(3)]


def test_two_groups_of_experts_in_a_layer_are_refused():
    """As in ERNIE-4.5-VL: an adapter's names could mean either."""
    model = empty("qwen3_moe", **ARCHITECTURES["qwen3_moe"])
    model.model.layers[1].mlp.pictures = torch.nn.ModuleDict(
        {"experts": copy.deepcopy(model.model.layers[1].mlp.experts)}
    )
    with pytest.raises(
        KTModelError, match=r"several groups of experts in layer 1, .*mlp\.experts and .*pictures\.experts"
    ):
        find_experts(model)
