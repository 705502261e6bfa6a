"""Configurations of architectures in the table that change which experts are chosen, and in which layers: against stock transformers."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import architectures
from helpers.loading import load, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamafactory_kt.model.state import kt_state


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True, "decoder_sparse_step": 2}),
        ("qwen3_moe", {"num_experts_per_tok": 6, "mlp_only_layers": [1], "tie_word_embeddings": True}),
        ("qwen3_moe", {"num_experts": 1, "num_experts_per_tok": 1, "attention_bias": True}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 24, "norm_topk_prob": True}),
        ("deepseek_v3", {"n_group": 3, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 7.5}),
        ("deepseek_v3", {"first_k_dense_replace": 0, "norm_topk_prob": False, "q_lora_rank": None}),
        ("llama4_text", {"num_experts_per_tok": 2, "interleave_moe_layer_step": 2}),
        ("jamba", {"expert_layer_period": 2, "expert_layer_offset": 0, "hidden_act": "gelu"}),
    ],
)
def test_exact(tmp_path, name, changes):
    _, error, effect = architectures.errors(architectures.tiny_model(name, **changes), tmp_path)
    assert error < architectures.EXACT
    assert effect > architectures.EFFECT


def test_experts_chosen_by_groups_in_deepseek_v2(tmp_path):
    """As in DeepSeek-V2 and V2.5. In transformers before 5.16 the model's block reads a number of experts that it does not have."""
    keys = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}
    stock = architectures.tiny_model("deepseek_v2", **keys)
    stock.save_pretrained(tmp_path)
    for module in stock.modules():
        if hasattr(module, "experts") and not hasattr(module, "num_experts"):
            module.num_experts = 6
    found, wanted = (logits(model) for model in (load(tmp_path, "torch", dtype=torch.float32), stock))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, topk_method="greedy")
    assert (logits(plain) - wanted).norm() > 0.01 * wanted.norm(), "the groups decide"
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_tokens_are_left_out(tmp_path, name):
    """DeepSeek-V3 and GLM-4.5 store one after the last, with experts of its own."""
    stock = architectures.tiny_model(name)
    stock.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(file)
    further = {key.replace(".2.", ".3.", 1): value + 1 for key, value in tensors.items() if ".layers.2." in key}
    further["model.layers.3.eh_proj.weight"] = torch.ones(64, 128)
    save_file({**tensors, **further}, file, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_nextn_predict_layers": 1}))
    model = load(tmp_path, "torch", dtype=torch.float32)
    assert [wrapper.info.layer for wrapper in kt_state(model).wrappers] == [1, 2]
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-4, atol=1e-4)
