"""The reference for engines: float32, one expert at a time, read from the files.

It shares no code and no weights with the engines; only the lookup of tensor names is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

from ...adapters import AdapterSet, ExpertLora
from ...checkpoint.discovery import ExpertsModule
from ...checkpoint.opening import open_checkpoint

ExpertWeights = dict[str, torch.Tensor]
"""``gate`` and ``up`` [I, H], ``down`` [H, I], float32"""


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
        moe = open_checkpoint(directory, fp8=True)
        self.modules: dict[int, ExpertsModule] = {module.layer: module for module in moe.experts}
        self.adapters = adapters
        adapters.check_fits(moe.shapes)
        self._block = moe.layout.block
        names = moe.layout.names()
        self._tensors = {m.layer: {place: name for name, place in names[m.name].items()} for m in moe.experts}
        """layer -> (projection, expert), or (fused weight, None) -> tensor of the checkpoint"""
        self._files: dict[str, Path] = {}
        for file in moe.files:
            with safe_open(file, framework="pt") as handle:
                self._files |= dict.fromkeys(handle.keys(), file)

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
        x, scores, lora = hidden.float(), weights.float(), self.lora(layer)
        outs = torch.zeros_like(x), torch.zeros_like(x)
        for expert in index.unique().tolist():
            base = self._read(layer, expert)
            token, slot = torch.where(index == expert)
            share = scores[token, slot, None]
            outs[0].index_add_(0, token, share * _gated(base, x[token]))
            changed = _merged(base, lora, expert) if lora is not None else base
            outs[1].index_add_(0, token, share * _gated(changed, x[token]))
        return outs

    def _read(self, layer: int, expert: int) -> ExpertWeights:
        shape, names = self.modules[layer].shape, self._tensors[layer]

        def stored(name: str, slice_of: int | None) -> torch.Tensor:
            with safe_open(self._files[name], framework="pt") as handle:
                value: Any = handle.get_slice(name)
                read: torch.Tensor = value[slice_of] if slice_of is not None else value[:]
            return read.float()

        def tensor(name: str, slice_of: int | None) -> torch.Tensor:
            value, scales = stored(name, slice_of), f"{name}_scale_inv"
            if self._block is None or scales not in self._files:
                return value
            factors = stored(scales, slice_of).repeat_interleave(self._block[0], 0).repeat_interleave(self._block[1], 1)
            return value * factors[: value.shape[0], : value.shape[1]]

        if ("gate", expert) in names:
            return {projection: tensor(names[projection, expert], None) for projection in ("gate", "up", "down")}
        gate_up, down = (tensor(names[fused, None], expert) for fused in ("gate_up_proj", "down_proj"))
        hidden, intermediate = shape.hidden_size, shape.intermediate_size
        if gate_up.shape != (2 * intermediate, hidden):
            gate_up = gate_up.T
        if down.shape != (hidden, intermediate):
            down = down.T
        gate, up = gate_up.chunk(2)
        return {"gate": gate, "up": up, "down": down}


def _gated(expert: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    """``down(silu(gate x) * up x)``"""
    return F.linear(F.silu(F.linear(x, expert["gate"])) * F.linear(x, expert["up"]), expert["down"])


def _merged(expert: ExpertWeights, lora: ExpertLora, number: int) -> ExpertWeights:
    """The weights with ``scaling * B @ A`` added; engines multiply by A and B instead."""
    return {
        projection: weight
        + (lora.b[projection][number].float() * lora.scaling[projection][number].float())
        @ lora.a[projection][number].float()
        for projection, weight in expert.items()
    }
