"""The LoRA of a layer's experts, as the native kernels multiply it."""

from __future__ import annotations

import torch

from ...adapters import ExpertLora, ExpertsShape
from ...ground.paging import empty_in_huge_pages
from ...native.library import PANEL, from_panels, in_panels


def lora_size(shape: ExpertsShape, rank: int) -> int:
    """Bytes of a :class:`FusedLora`."""
    sizes = (shape.projection(projection) for projection in shape.projections)
    return 4 * shape.num_experts * rank * sum(width + -(-rows // PANEL) * PANEL for rows, width in sizes)


class FusedLora:
    """float32 factors: A [E, r, in], and B in panels [E, out / 16, r, 16] with the scaling folded in.

    Args:
        lora: the layer's LoRA, any dtype.
    """

    def __init__(self, lora: ExpertLora):
        self.rank = lora.rank
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for projection, given in lora.b.items():
            if given.shape[1]:
                own = lora.a[projection], in_panels(lora.folded(projection, 1.0))
                a, b = (empty_in_huge_pages(tuple(t.shape), torch.float32).copy_(t) for t in own)
                self.factors[projection] = a, b
        self.nbytes = sum(tensor.nbytes for pair in self.factors.values() for tensor in pair)

    def of(self, projection: str, expert: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [rows, r] of one expert, float32; B with the scaling."""
        a, b = self.factors[projection]
        return a[expert], from_panels(b[expert], rows)
