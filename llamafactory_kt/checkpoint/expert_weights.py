"""Weights and biases of a layer's experts, as they were read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..adapters import ExpertsShape
from ..ground.paging import in_huge_pages


class ExpertWeights(NamedTuple):
    """One expert's weights: gate and up [I, H], down [H, I], on the CPU. Without a gate, gate is [0, H]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class ExpertBiases(NamedTuple):
    """A layer's biases: gate and up [E, I], down [E, H], float32 on the CPU. Without a gate, gate is [E, 0]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass
class LayerWeights:
    """One layer's expert weights: gate and up [E, I, H], down [E, H, I], on the CPU."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def stacked(
        cls, experts: Iterable[ExpertWeights], shape: ExpertsShape, dtype: torch.dtype, padded: tuple[int, int]
    ) -> LayerWeights:
        """Copy the experts into stacked tensors.

        Args:
            padded: hidden and intermediate size of the result; the padding is zeros.
        """
        hidden, intermediate = padded
        make = torch.empty if padded == (shape.hidden_size, shape.intermediate_size) else torch.zeros
        sizes = (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)
        stacks = [in_huge_pages(make(shape.num_experts, *size, dtype=dtype, device="cpu")) for size in sizes]
        for number, expert in enumerate(experts):
            for stack, matrix in zip(stacks, expert, strict=True):
                stack[number, : matrix.shape[0], : matrix.shape[1]].copy_(matrix)
        return cls(*stacks)
