"""The reference for engines: float32, one expert at a time, read from the files.

It shares no code and no weights with the engines; only where the tensors are, and how they are stored, comes from the same place.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn import functional as F

from ...adapters import AdapterSet, ExpertLora
from ...adapters.keys import PROJECTIONS
from ...checkpoint.discovery import ExpertsModule
from ...checkpoint.formula import ExpertFormula
from ...checkpoint.opening import open_checkpoint
from ...checkpoint.stored_weight import StoredWeight

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
        x, scores, lora, module = hidden.float(), weights.float(), self.lora(layer), self.modules[layer]
        biases = self._layout.layer(module.name).biases()
        outs = torch.zeros_like(x), torch.zeros_like(x)
        for expert in index.unique().tolist():
            base = self._read(layer, expert)
            token, slot = torch.where(index == expert)
            share = scores[token, slot, None]
            own = dict(zip(PROJECTIONS, (bias[expert] for bias in biases), strict=True)) if biases is not None else {}
            outs[0].index_add_(0, token, share * _output(module.formula, base, own, x[token]))
            changed = _merged(base, lora, expert) if lora is not None else base
            outs[1].index_add_(0, token, share * _output(module.formula, changed, own, x[token]))
        return outs

    def _read(self, layer: int, expert: int) -> ExpertWeights:
        tensors = self._layout.layer(self.modules[layer].name)

        def read(weight: StoredWeight, slice_of: int | None) -> torch.Tensor:
            parts = {}
            for part, tensor in weight.parts.items():
                with safe_open(tensor.file, framework="pt") as handle:
                    value = handle.get_tensor(tensor.name)
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


def _merged(expert: ExpertWeights, lora: ExpertLora, number: int) -> ExpertWeights:
    """The weights with ``scaling * B @ A`` added; engines multiply by A and B instead."""
    return {
        projection: weight
        + (lora.b[projection][number].float() * lora.scaling[projection][number].float())
        @ lora.a[projection][number].float()
        for projection, weight in expert.items()
    }
