"""Which models have experts that KT can compute, and why others are refused."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM

from llamafactory_kt import KTModelError
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


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("llama", SMALL, "LlamaForCausalLM has no routed experts"),
        ("gpt_oss", {**SMALL, "num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 32}, "they have biases"),
        (
            "qwen3_moe",
            {**ARCHITECTURES["qwen3_moe"], "hidden_act": "gelu"},
            "they do not compute down(silu(gate x) * up x)",
        ),
        ("nemotron_h", {}, "they have no gate projection"),
        (
            "granitemoe",
            {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
            "is a mixture of experts, but its experts are not",
        ),
    ],
)
def test_refused_with_the_reason(name, keys, message):
    with pytest.raises(KTModelError) as error:
        find_experts(empty(name, **keys))
    assert message in str(error.value)


def test_experts_that_compute_something_else_are_found_out(monkeypatch):
    """A class with the expected form that clamps its input inside forward."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    plain = Qwen3MoeExperts.forward.__wrapped__

    def clamped(self, hidden_states, index, weights):
        return plain(self, hidden_states.clamp(max=1.0), index, weights)

    forward = type(Qwen3MoeExperts.forward)(
        Qwen3MoeExperts.forward.__code__, globals(), closure=Qwen3MoeExperts.forward.__closure__
    )
    forward.__wrapped__ = clamped
    monkeypatch.setattr(Qwen3MoeExperts, "forward", forward)
    with pytest.raises(KTModelError, match="they do not compute"):
        find_experts(empty("qwen3_moe", **ARCHITECTURES["qwen3_moe"]))
