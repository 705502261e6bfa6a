"""What an engine computes with, handed out: another device can compute some of its experts with the same values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..native.packed import Matrix, PackedWeight


@dataclass(frozen=True)
class Product:
    """One projection of one expert, ``weight x + bias + b (a x)``; all on the CPU. The next exchange of LoRA may free ``a`` and ``b``."""

    weight: Matrix
    """[out, in], as the engine keeps it"""
    bias: torch.Tensor | None = None
    """[out] float32"""
    a: torch.Tensor | None = None
    """[r, in], any floating dtype; None without LoRA"""
    b: torch.Tensor | None = None
    """[out, r] float32, with the scaling"""

    def plain_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in]: as the engine keeps it, or where it keeps codes, what they stand for, in a dtype."""
        return self.weight.dequantize(dtype) if isinstance(self.weight, PackedWeight) else self.weight
