"""Adapters that other tools wrote, and what those tools' arithmetic makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamafactory_kt import apply_adapter

from .loading import load
from .places import DATA

BASE, BUNDLE, TARGETS = (
    DATA / name for name in ("qwen3_moe-tiny", "qwen3_moe-tiny-kt-bundle", "qwen3_moe-tiny-target-parameters")
)


def ours(adapter: Path, path: Path = BASE):
    """A float32 model with KT experts and the adapter, and the load report."""
    return apply_adapter(load(path, "torch", dtype=torch.float32, adapter=str(adapter)), adapter)


def copied(tmp_path: Path, source: Path = BUNDLE) -> Path:
    return Path(shutil.copytree(source, tmp_path / "adapter"))


def stock(path=BASE):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
def bundle_reference(model, adapter: Path):
    """The official stack's arithmetic as a plain sum: alpha / r for experts, attention and routers."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factor = config["lora_alpha"] / config["r"]
    weights = dict(model.named_parameters())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").split(".lora_A")[0]
            weights[f"{module}.weight"] += factor * tensors[name.replace("lora_A", "lora_B")].float() @ a.float()
    fused = load_file(adapter / "fused_expert_lora.safetensors")
    for layer in range(model.config.num_hidden_layers):
        lora = {p: fused[f"layers.{layer}.experts.{p}_lora_b"].float() @ fused[f"layers.{layer}.experts.{p}_lora_a"].float() for p in ("gate", "up", "down")}  # fmt: skip
        weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"] += factor * torch.cat([lora["gate"], lora["up"]], 1)
        weights[f"model.layers.{layer}.mlp.experts.down_proj"] += factor * lora["down"]
    return model


def peft_target_parameters(tmp_path, base, targets, std=0.1, **config):
    torch.manual_seed(3)
    peft_config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=targets, task_type="CAUSAL_LM", **config
    )
    made = get_peft_model(stock(base), peft_config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, std)
    made.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", made.eval()


def moe_lora_of(bundle: Path, file: Path) -> Path:
    """``moe_lora.pt`` with the bundle's experts, written as the SGLang converter does."""
    fused = load_file(bundle / "fused_expert_lora.safetensors")
    out = {
        "metadata": {
            "lora_rank": 8,
            "lora_alpha": 16.0,
            "num_experts": 8,
            "num_layers": 3,
            "hidden_size": 128,
            "intermediate_size": 64,
        }
    }
    for name, tensor in fused.items():
        _, layer, _, part = name.split(".")
        out.setdefault(f"layer_{layer}", {})[part] = tensor
    torch.save(out, file)
    return file
