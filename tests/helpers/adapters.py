"""Random adapters for the models of ``helpers.models``, and changes to their files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .models import moe_layers, other_modules


def make_adapter(
    directory: Path,
    model: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    naming: str = "B",
    skip_layers: tuple[int, ...] = (),
    dtype=torch.bfloat16,
    scale: float = 1.0,
    seed: int = 1,
    **config,
) -> Path:
    """Save a random adapter on every linear module and every expert.

    ``naming``: ``A`` (``mlp.original_moe.experts``), ``B`` (``mlp.experts``) or ``mixtral``
    (``block_sparse_moe.experts`` with ``w1``/``w3``/``w2``).
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors: dict[str, torch.Tensor] = {}

    def add(module: str, out: int, size: int) -> None:
        tensors[f"base_model.model.{module}.lora_A.weight"] = random(rank, size) * size**-0.5
        tensors[f"base_model.model.{module}.lora_B.weight"] = random(out, rank) * scale * 0.3 * rank**-0.5

    for module, (out, size) in other_modules(model).items():
        add(module, out, size)
    names = {"gate": "w1", "up": "w3", "down": "w2"} if naming == "mixtral" else None
    for layer, (module, experts, hidden, intermediate) in moe_layers(model).items():
        if layer in skip_layers:
            continue
        block = module.removesuffix(".experts")
        block = {"A": f"{block}.original_moe", "B": block, "mixtral": block.replace(".mlp", ".block_sparse_moe")}[
            naming
        ]
        for expert in range(experts):
            for projection in ("gate", "up", "down"):
                out, size = (hidden, intermediate) if projection == "down" else (intermediate, hidden)
                add(f"{block}.experts.{expert}.{names[projection] if names else f'{projection}_proj'}", out, size)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    write_config(directory, model, r=rank, lora_alpha=alpha, target_modules=targets, **config)
    return directory


def write_config(directory: Path, model: Path | str, **config) -> None:
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model), "bias": "none",
              "peft_version": "0.18.1", "inference_mode": True, **config}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(values))


def edit_adapter(directory: Path, change) -> Path:
    """Rewrite an adapter's tensors: ``change(tensors) -> tensors`` on a plain dictionary."""
    file = directory / "adapter_model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def delta_of(lora, projection: str, expert: int) -> torch.Tensor:
    """ΔW [out, in] of one expert of an ``ExpertLora``, float64."""
    b = lora.b[projection][expert].double() * lora.scaling[projection][expert]
    return b @ lora.a[projection][expert].double()


def make_dora(directory: Path, model: Path):
    """An adapter with DoRA on attention and a trained head, and PEFT's own model with it."""
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "o_proj"],
        use_dora=True,
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    made = get_peft_model(stock, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    made.save_pretrained(directory)
    return made.eval()
