"""The interface every engine offers: it computes one layer's routed experts on the CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..adapters import ExpertLora, ExpertsShape
from ..checkpoint.reader import ExpertWeights


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is built for."""

    layer: int
    shape: ExpertsShape
    num_experts_per_tok: int
    lora_rank: int
    """rank to have room for; 0 where no LoRA is to come"""
    lora_scaling: float = 1.0
    """scaling the LoRA to come will mostly have"""


ReadExperts = Callable[[torch.dtype | None], Iterable[ExpertWeights]]
"""Reads a layer's experts from its checkpoint in turn, in a dtype or, for None, in its own. Each one's weights are to be
used, or copied, before the next is asked for."""

Undo = Callable[[], None]
"""Puts back what was there before."""


class Engine(ABC):
    """One layer's experts. Weights and LoRA are plain tensors outside any module: ``model.to()`` never moves them."""

    name: str
    """as the load table calls it"""

    def __init__(self, spec: EngineSpec, read_experts: ReadExperts):
        self.spec = spec
        self.lora_rank = 0
        """rank of the LoRA in place, 0 for none"""
        self._read_experts = read_experts

    @abstractmethod
    def load(self) -> None:
        """Read the base weights."""

    @abstractmethod
    def set_lora(self, lora: ExpertLora | None) -> Undo:
        """Replace the LoRA, of any rank; None for the base alone. The old one stays in place if this fails.

        Returns:
            A call that puts the old one back, for as long as it is kept.
        """

    @abstractmethod
    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``sum_k weights[t, k] * expert[index[t, k]](hidden[t])``.

        Args:
            hidden: [T, H], any floating dtype, CPU.
            index: [T, K] int64, CPU.
            weights: [T, K], any floating dtype, CPU.

        Returns:
            [T, H] in the dtype of ``hidden``.
        """

    def nbytes_for_rank(self, rank: int) -> int:
        """Memory beyond the present that base weights with room for a LoRA of this rank take."""
        return 0

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of the packed base weights."""

    @property
    @abstractmethod
    def lora_nbytes(self) -> int:
        """Memory of the LoRA tensors."""
