"""The arithmetic that engines are checked against: float32, one expert at a time, from the files and nothing else.

It shares no code with the engines and nothing that they hold. Names of tensors are found by the same headers.
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

Expert = dict[str, torch.Tensor]
"""``gate`` and ``up`` [I, H], ``down`` [H, I], float32"""


class Reference:
    """A checkpoint and the adapters that were applied to it.

    Args:
        directory: a local checkpoint in safetensors.
        adapters: opened from their files.

    Raises:
        KTPathError: There are no safetensors files.
        KTModelError: The checkpoint is not one that can be read.
        KTAdapterError: An adapter does not fit it.
    """

    def __init__(self, directory: Path, adapters: AdapterSet):
        moe = open_checkpoint(directory, fp8=True)
        self.modules: dict[int, ExpertsModule] = {module.layer: module for module in moe.experts}
        self.adapters = adapters
        adapters.check_fits(moe.shapes)
        self._names, self._block = moe.layout.names(), moe.layout.block
        self._files: dict[str, Path] = {}
        for file in moe.files:
            with safe_open(file, framework="pt") as handle:
                self._files |= dict.fromkeys(handle.keys(), file)

    def lora(self, layer: int) -> ExpertLora | None:
        """A layer's LoRA, read from the adapters' files."""
        return self.adapters.read_layer(layer, self.modules[layer].shape)

    def compute(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer's experts give for the inputs of :meth:`~llamafactory_kt.engines.base.Engine.forward`.

        Returns:
            Without and with LoRA, both [T, H] float32.
        """
        x, scores, lora = hidden.float(), weights.float(), self.lora(layer)
        outs = torch.zeros_like(x), torch.zeros_like(x)
        pieces = self._pieces(layer)
        for expert in index.unique().tolist():
            base = self._read(layer, pieces, expert)
            token, slot = torch.where(index == expert)
            share = scores[token, slot, None]
            outs[0].index_add_(0, token, share * _gated(base, x[token]))
            changed = _merged(base, lora, expert) if lora is not None else base
            outs[1].index_add_(0, token, share * _gated(changed, x[token]))
        return outs

    def _pieces(self, layer: int) -> dict[tuple[str, int | None], str]:
        """(projection, expert), or (fused weight, None), -> tensor of the checkpoint."""
        return {place: name for name, place in self._names[self.modules[layer].name].items()}

    def _read(self, layer: int, pieces: dict[tuple[str, int | None], str], expert: int) -> Expert:
        shape = self.modules[layer].shape

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

        if ("gate", expert) in pieces:
            return {projection: tensor(pieces[projection, expert], None) for projection in ("gate", "up", "down")}
        fused = {name: tensor(pieces[name, None], expert) for name in ("gate_up_proj", "down_proj")}
        wanted = {
            "gate_up_proj": (2 * shape.intermediate_size, shape.hidden_size),
            "down_proj": (shape.hidden_size, shape.intermediate_size),
        }
        fused = {n: value if tuple(value.shape) == wanted[n] else value.T for n, value in fused.items()}
        gate, up = fused["gate_up_proj"].chunk(2)
        return {"gate": gate, "up": up, "down": fused["down_proj"]}


def _gated(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    """``down(silu(gate x) * up x)``."""
    return F.linear(F.silu(F.linear(x, expert["gate"])) * F.linear(x, expert["up"]), expert["down"])


def _merged(expert: Expert, lora: ExpertLora, number: int) -> Expert:
    """The weights with ``scaling * B @ A`` added: the very matrix, where engines multiply by A and B apart."""
    return {
        projection: weight
        + (lora.b[projection][number].float() * lora.scaling[projection][number].float())
        @ lora.a[projection][number].float()
        for projection, weight in expert.items()
    }
