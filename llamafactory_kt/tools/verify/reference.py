"""The reference for engines: float32, one expert at a time, read from the files.

It shares no code and no weights with the engines; only where the tensors are, and how they are stored, comes from the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ...adapters import Adapter, AdapterSet, ExpertLora
from ...adapters.keys import PEFT_PREFIX, PROJECTIONS
from ...adapters.projections import GATE_UP, ProjectionAdapter
from ...checkpoint.discovery import ExpertsModule
from ...checkpoint.formula import ExpertFormula
from ...checkpoint.opening import open_checkpoint
from ...checkpoint.stored_weight import StoredWeight
from ...ground.tensors.safetensors_files import open_mapped, read_tensor
from .peft_reading import read_by_peft

ExpertWeights = dict[str, torch.Tensor]
"""``gate`` and ``up`` [I, H], ``down`` [H, I], float32; without a gate, ``gate`` is [0, H]"""


class Reference:
    """A checkpoint with its adapters.

    Args:
        directory: a local checkpoint in safetensors.
        adapters: opened from their files.

    Raises:
        KTPathError: There are no safetensors files.
        KTModelError: The checkpoint cannot be read.
        KTAdapterError: An adapter does not fit it.
    """

    def __init__(self, directory: Path, adapters: AdapterSet):
        moe = open_checkpoint(directory, quantized=True)
        self.modules: dict[int, ExpertsModule] = {module.layer: module for module in moe.experts}
        self.adapters = adapters
        adapters.check_fits(moe.shapes)
        self._layout = moe.layout

    def lora(self, layer: int) -> ExpertLora | None:
        """Read a layer's LoRA from the adapters' files."""
        return self.adapters.read_layer(layer, self.modules[layer].shape)

    def compute(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a layer's experts; the arguments are those of :meth:`~llamafactory_kt.engines.base.Engine.forward`.

        Returns:
            The output without and with LoRA, both [T, H] float32.
        """
        x, scores, module = hidden.float(), weights.float(), self.modules[layer]
        deltas = [_deltas(adapter, layer, module) for adapter in self.adapters.adapters if layer in adapter.layers]
        biases = self._layout.layer(module.name).biases()
        outs = torch.zeros_like(x), torch.zeros_like(x)
        for expert in index.unique().tolist():
            base = self._read(layer, expert)
            token, slot = torch.where(index == expert)
            share = scores[token, slot, None]
            own = dict(zip(PROJECTIONS, (bias[expert] for bias in biases), strict=True)) if biases is not None else {}
            outs[0].index_add_(0, token, share * _output(module.formula, base, own, x[token]))
            changed = dict(base)
            for added in (delta(expert) for delta in deltas):
                changed = {projection: weight + added.get(projection, 0) for projection, weight in changed.items()}
            outs[1].index_add_(0, token, share * _output(module.formula, changed, own, x[token]))
        return outs

    def _read(self, layer: int, expert: int) -> ExpertWeights:
        tensors = self._layout.layer(self.modules[layer].name)

        def read(weight: StoredWeight, slice_of: int | None) -> torch.Tensor:
            parts = {}
            for part, tensor in weight.parts.items():
                with open_mapped(tensor.file) as handle:
                    value = read_tensor(handle, tensor.name)
                    parts[part] = value[slice_of] if slice_of is not None else value
            return weight.decode(parts, torch.float32)

        return tensors.canonical(
            {
                name: read(tensors.stored[name, number], expert if number is None else None)
                for name, number in tensors.of_expert(expert)
            }
        )


def _output(formula: ExpertFormula, expert: ExpertWeights, biases: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    gate, up = (F.linear(x, expert[projection], biases.get(projection)) for projection in ("gate", "up"))
    return F.linear(formula.activate(gate, up), expert["down"], biases.get("down"))


Deltas = Callable[[int], ExpertWeights]
"""expert -> what an adapter adds to its weights"""


def _deltas(adapter: Adapter, layer: int, module: ExpertsModule) -> Deltas:
    """One layer's, as PEFT reads the adapter; by a plain sum what PEFT does not read: bundles, stacked experts, ranks that are not in the
    configuration."""
    if isinstance(adapter, ProjectionAdapter) and not adapter.other_ranks:
        read = cache(adapter.read)
        return lambda expert: _delta_by_peft(adapter, layer, module, expert, read)
    lora = adapter.read_layer(layer, module.shape)
    return lambda expert: {
        projection: (lora.b[projection][expert].float() * lora.scaling[projection][expert].float())
        @ lora.a[projection][expert].float()
        for projection in PROJECTIONS
    }


def _delta_by_peft(
    adapter: ProjectionAdapter, layer: int, module: ExpertsModule, expert: int, read: Callable[[str], torch.Tensor]
) -> ExpertWeights:
    modules: dict[str, nn.Module] = {}
    tensors: dict[str, torch.Tensor] = {}
    names = {}
    for projection, (name, a, b) in adapter.pairs(layer, expert, read).items():
        modules[name] = nn.Linear(a.shape[1], b.shape[0], bias=False)
        nn.init.zeros_(modules[name].weight)  # type: ignore[arg-type]
        tensors |= {f"{PEFT_PREFIX}{name}.lora_{side}.weight": tensor for side, tensor in (("A", a), ("B", b))}
        names[projection] = name
    if not names:
        return {}
    merged = read_by_peft(adapter.settings, tensors, modules)
    deltas = {projection: merged.get_parameter(f"{name}.weight").data for projection, name in names.items()}
    if GATE_UP in deltas:
        deltas["gate"], deltas["up"] = module.shape.fused.split(deltas.pop(GATE_UP), 0)
    return deltas
