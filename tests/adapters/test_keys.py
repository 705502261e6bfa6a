"""How tensors in adapter files are named."""

from __future__ import annotations

import pytest

from llamafactory_kt.adapters.keys import ExpertKey, parse_expert_key, split_module


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("base_model.model.model.layers.1.mlp.original_moe.experts.5.gate_proj.lora_A.weight", (1, 5, "gate", "a")),
        ("base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_B.weight", (1, 5, "gate", "b")),
        ("model.layers.26.mlp.experts.63.down_proj.lora_B.default.weight", (26, 63, "down", "b")),
        ("model.layers.0.mlp.experts.7.up_proj.orig_module.lora_A.weight", (0, 7, "up", "a")),
        ("base_model.model.model.layers.3.block_sparse_moe.experts.2.w1.lora_A.weight", (3, 2, "gate", "a")),
        ("base_model.model.model.layers.3.block_sparse_moe.experts.2.w3.lora_A.weight", (3, 2, "up", "a")),
        ("base_model.model.model.layers.3.block_sparse_moe.experts.2.w2.lora_B.weight", (3, 2, "down", "b")),
        ("base_model.model.model.language_model.layers.4.mlp.experts.0.up_proj.lora_A.weight", (4, 0, "up", "a")),
        ("base_model.model.language_model.model.layers.4.mlp.experts.0.up_proj.lora_A.weight", (4, 0, "up", "a")),
        ("base_model.model.model.layers.1.mlp.shared_experts.gate_proj.lora_A.weight", None),
        ("base_model.model.model.layers.1.mlp.shared_experts.0.gate_proj.lora_A.weight", None),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", None),
        ("base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_magnitude_vector", None),
        ("base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_B.bias", None),
    ],
)
def test_expert_keys(key, wanted):
    assert parse_expert_key(key) == (ExpertKey(*wanted) if wanted else None)


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", ("model.layers.0.self_attn.q_proj", "lora_A.weight")),
        ("model.layers.0.self_attn.q_proj.lora_B.default.weight", ("model.layers.0.self_attn.q_proj", "lora_B.weight")),
        ("base_model.model.model.layers.0.mlp.gate_proj.lora_magnitude_vector", ("model.layers.0.mlp.gate_proj", "lora_magnitude_vector.weight")),
        ("base_model.model.model.embed_tokens.lora_embedding_A", ("model.embed_tokens", "lora_embedding_A")),
        ("base_model.model.lm_head.weight", ("lm_head", "weight")),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", ("model.layers.0.self_attn.q_proj", "lora_B.bias")),
    ],
)  # fmt: skip
def test_module_names(key, wanted):
    assert split_module(key) == wanted
