"""Small random models of seven architectures, made on the spot.

Sizes differ wherever a mix-up could hide: the numbers of experts, the hidden size and the intermediate size are all
different, and every expert has its own weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from .places import DEMO

VOCAB = 1024

# hidden 64 (or 72: not a multiple of the kernel's 32), experts' intermediate 96 (or 40)
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 3, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.15,
}  # fmt: skip
_MLA = {
    "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 6, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 96,
}  # fmt: skip
ARCHITECTURES: dict[str, dict] = {
    "deepseek_v2": {**_COMMON, **_MLA, "topk_method": "greedy"},
    "deepseek_v3": {**_COMMON, **_MLA},
    "qwen2_moe": {**_COMMON, "num_experts": 6, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 80},
    "qwen3_moe": {**_COMMON, "hidden_size": 72, "head_dim": 16, "num_experts": 6, "moe_intermediate_size": 96},
    "mixtral": {**_COMMON, "num_local_experts": 6, "intermediate_size": 96},
    "glm4_moe": {
        **_COMMON, "n_routed_experts": 6, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 16,
        "moe_intermediate_size": 96, "first_k_dense_replace": 1,
    },
    "olmoe": {**_COMMON, "num_experts": 6, "intermediate_size": 96},
}  # fmt: skip


def make_model(directory: Path, architecture: str, *, dtype=torch.bfloat16, seed: int = 0, **changes) -> Path:
    """Save a random model with the demo's tokenizer; the weights of no two experts are equal."""
    torch.manual_seed(seed)
    save_options = {k: changes.pop(k) for k in ("max_shard_size", "save_original_format") if k in changes}
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES.get(architecture, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.0 if ".gate.weight" in name else parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(0, 0.1)
    model.to(dtype).save_pretrained(directory, **save_options)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / file, directory)
    return directory


def stock_class(directory: Path) -> Any:
    """The class of transformers that the checkpoint names."""
    return getattr(transformers, AutoConfig.from_pretrained(directory).architectures[0])


def moe_layers(directory: Path) -> dict[int, tuple[str, int, int, int]]:
    """layer -> (experts' module, experts, hidden, intermediate), from a stock model."""
    with torch.device("meta"):
        model = stock_class(directory)(AutoConfig.from_pretrained(directory))
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            experts, hidden, intermediate = module.down_proj.shape
            found[int(name.split(".layers.")[1].split(".")[0])] = (name, experts, hidden, intermediate)
    return found


def other_modules(directory: Path) -> dict[str, tuple[int, int]]:
    """Linear modules other than routed experts and the output layer: name -> (out, in)."""
    with torch.device("meta"):
        model = stock_class(directory)(AutoConfig.from_pretrained(directory))
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name and not name.endswith((".gate", "_gate"))
    }
