"""How a model's fused weights of all experts lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FusedLayout:
    """The axes and rows of ``gate_up_proj`` (``up_proj`` without a gate) and ``down_proj``. Most models have [E, out, in], gate's
    rows before up's."""

    transposed: bool = False
    """[E, in, out]"""
    interleaved: bool = False
    """the rows of gate and up take turns: gate 0, up 0, gate 1, ..."""

    def stored(self, out: int, width: int) -> tuple[int, int]:
        """The sizes in which a weight [out, in] is stored."""
        return (width, out) if self.transposed else (out, width)

    def rows(self, count: int) -> tuple[slice, slice]:
        """Which of the 2I rows of ``gate_up_proj`` are gate's, and which are up's."""
        return (
            (slice(0, count, 2), slice(1, count, 2))
            if self.interleaved
            else (slice(0, count // 2), slice(count // 2, count))
        )

    def split(self, gate_up: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """gate and up, which share a dimension of size 2I; views."""
        gate, up = ((slice(None),) * dim + (rows,) for rows in self.rows(gate_up.shape[dim]))
        return gate_up[gate], gate_up[up]

    def join(self, gate: torch.Tensor, up: torch.Tensor, dim: int) -> torch.Tensor:
        """What :meth:`split` splits. ``gate`` may be empty."""
        if self.interleaved and gate.shape[dim]:
            return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)
        return torch.cat((gate, up), dim)


USUAL = FusedLayout()
