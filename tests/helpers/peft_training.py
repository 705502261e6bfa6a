"""Adapters that PEFT itself makes, with more than LoRA in them, and the float32 model that PEFT then computes."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

TOKENS = [*range(35, 60), 999]
"""among them most of those that the logits are computed for"""
CASES = {
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "output layer saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "LoRA on both, kept tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": TOKENS},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    "tokens of the output layer": {"trainable_token_indices": {"lm_head": TOKENS}},
    "norms and routers saved": {"modules_to_save": ["input_layernorm", "norm", "mlp.gate"]},
    "a dense layer saved": {"modules_to_save": ["o_proj"]},
    "biases": {"bias": "all"},
    "biases of LoRA's layers": {"bias": "lora_only"},
    "biases of B": {"lora_bias": True},
    "DoRA on embeddings": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "DoRA, and a module saved": {"use_dora": True, "modules_to_save": ["lm_head"]},
}


def trained(base, directory, scale=0.1, tokens=None, save="auto", **keys):
    """An adapter of PEFT's with random values in all that it trains, and the float32 model that has it."""
    torch.manual_seed(5)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tokens is not None:
        stock.resize_token_embeddings(tokens, mean_resizing=False)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **keys}
    )
    model = get_peft_model(stock, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(directory, save_embedding_layers=save)
    return directory, model.eval()
