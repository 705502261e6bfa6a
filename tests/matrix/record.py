"""Adapters that the installed PEFT makes and saves, with what its own forward answers: ``python tests/matrix/record.py DIRECTORY``.

Every other version of PEFT is tested with those in ``tests/data/peft-*``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

BASE = Path(__file__).parents[1] / "data" / "qwen3_moe-tiny"
IDS = torch.arange(3, 43).reshape(2, 20)
EVERY = 5
"""of the tokens' logits, one in so many is recorded"""
LOGITS = "logits.safetensors"
ADAPTERS: dict[str, dict[str, Any]] = {
    "target-parameters": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    # names of modules in transformers 4, which PEFT translates from 0.19 on: experts and routers become parameters, ranks double
    "old-names": {"target_modules": ["o_proj", "gate", "gate_proj", "up_proj", "down_proj"]},
}


@torch.no_grad()
def record(directory: Path, base: Path = BASE, **config: Any) -> torch.Tensor:
    """Save an adapter with random values, and some logits of PEFT's own forward in float32.

    Returns:
        All logits, [2, 20, vocabulary].
    """
    torch.manual_seed(11)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(stock, LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **config)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(0, 0.1)
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    logits: torch.Tensor = model(input_ids=IDS).logits
    save_file({"logits": logits[:, ::EVERY].contiguous()}, directory / LOGITS)
    return logits


if __name__ == "__main__":
    for name, config in ADAPTERS.items():
        record(Path(sys.argv[1]) / name, **config)
