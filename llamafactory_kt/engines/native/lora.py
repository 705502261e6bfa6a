"""The LoRA of a layer's experts, as the native kernels multiply it."""

from __future__ import annotations

import torch

from ...adapters import ExpertLora, ExpertsShape
from ...ground.paging import in_huge_pages


def lora_size(shape: ExpertsShape, rank: int) -> int:
    """Bytes of a :class:`FusedLora`."""
    return 4 * len(shape.projections) * shape.num_experts * rank * (shape.hidden_size + shape.intermediate_size)


class FusedLora:
    """float32 factors: A [E, r, in], and B [E, out, r] with the scaling folded in.

    Args:
        lora: the layer's LoRA, any dtype.
    """

    def __init__(self, lora: ExpertLora):
        self.rank = lora.rank
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for projection, b in lora.b.items():
            if b.shape[1]:
                a, folded = (in_huge_pages(torch.empty(t.shape, device="cpu")) for t in (lora.a[projection], b))
                self.factors[projection] = a.copy_(lora.a[projection]), lora.folded(projection, 1.0, folded)
        self.nbytes = sum(tensor.nbytes for pair in self.factors.values() for tensor in pair)
