"""What results are compared with: stock transformers with the adapter merged. And how far they are apart."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from .models import stock_class

_PROJECTIONS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}


@torch.no_grad()
def merged_float32(
    model: Path, adapter: Path | list[Path] | None, *, experts: bool = True, dtype=torch.float32, scaling=None
):
    """Stock transformers in ``dtype``, with one or more adapters added to the weights by a plain float32 sum.

    This is the reference and shares no code with the package. ``scaling(module, rank)`` replaces alpha / rank.
    """
    stock = stock_class(model).from_pretrained(model, dtype=torch.float32)
    for directory in [adapter] if isinstance(adapter, Path) else adapter or []:
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
        weights = dict(stock.named_parameters())
        for name, a in tensors.items():
            if ".lora_A." not in name:
                continue
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").split(".lora_A")[0]
            rank = a.shape[0]
            factor = scaling(module, rank) if scaling else config["lora_alpha"] / rank
            delta = factor * (b.double() @ a.double()).float()
            if ".experts." in module and "shared" not in module.split(".experts.")[0][-7:]:
                if not experts:
                    continue
                block, _, rest = (
                    module.replace(".original_moe", "").replace("block_sparse_moe", "mlp").partition(".experts.")
                )
                expert, projection = rest.split(".")
                place = _PROJECTIONS[projection]
                if place == 2:
                    weights[f"{block}.experts.down_proj"][int(expert)] += delta
                else:
                    weight = weights[f"{block}.experts.gate_up_proj"][int(expert)]
                    half = weight.shape[0] // 2
                    weight[place * half : (place + 1) * half] += delta
            else:
                weights[f"{module.replace('block_sparse_moe', 'mlp')}.weight"] += delta
    return stock.to(dtype).eval()


def rel(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def per_token(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error that three quarters of the tokens stay below. The rest may hold tokens whose router decided a
    tie the other way, which stock bfloat16 does too; one wrong expert of six would affect half the tokens."""
    errors = (found - wanted).flatten(0, 1).norm(dim=-1) / wanted.flatten(0, 1).norm(dim=-1)
    return float(errors.quantile(0.75))
