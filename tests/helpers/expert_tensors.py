"""Adapter files with nothing but LoRA for four small experts."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from llamafactory_kt.adapters import ExpertsShape

from .adapters import edit_adapter, write_config

SHAPE = ExpertsShape(num_experts=4, hidden_size=10, intermediate_size=6)
EXPERT = "base_model.model.model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.lora_{side}.weight"
FIRST = EXPERT.format(layer=2, expert=0, projection="gate", side="A")


def experts_tensors(ranks, layers=(2,), dtype=torch.float32):
    """Random expert LoRA; ``ranks(expert, projection)`` gives the rank, 0 for none."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in layers:
        for expert in range(SHAPE.num_experts):
            for projection in ("gate", "up", "down"):
                out, size = SHAPE.projection(projection)
                if rank := ranks(expert, projection):
                    for side, shape in (("A", (rank, size)), ("B", (out, rank))):
                        name = EXPERT.format(layer=layer, expert=expert, projection=projection, side=side)
                        tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def save(directory: Path, tensors, **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    write_config(directory, "base", **{"r": 3, "lora_alpha": 6, **config})
    return directory


def broken(tmp_path, change=None, tensors=None, **config):
    directory = save(tmp_path / "broken", experts_tensors(lambda e, p: 3) if tensors is None else tensors, **config)
    return edit_adapter(directory, change) if change else directory


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch hostile-code-was-run",)
