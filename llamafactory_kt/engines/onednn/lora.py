"""LoRA of a layer's experts as oneDNN's engine multiplies it."""

from __future__ import annotations

import torch

from ...adapters import ExpertLora, ExpertsShape
from ...ground.paging import in_large_pages

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""of one expert: A of gate and up side by side [H, 2r], B of both on a diagonal [2r, 2I]; A of down [I, r], B [r, H]"""


def lora_size(shape: ExpertsShape, rank: int) -> int:
    """Bytes of a LoRA as :class:`HeldLora` holds it, float32 with gate's and up's B on a diagonal."""
    return 4 * shape.num_experts * rank * (3 * shape.hidden_size + 5 * shape.intermediate_size)


class HeldLora:
    """In float32, whose products of this size take a third of the time of bfloat16's, with the scaling in B."""

    def __init__(self, lora: ExpertLora):
        experts, rank, hidden = lora.a["gate"].shape
        size = lora.a["down"].shape[2]

        def empty(*shape: int) -> torch.Tensor:
            return in_large_pages(torch.empty(experts, *shape, dtype=torch.float32, device="cpu"))

        # The zeros beside the diagonal are read faster than a second product is called.
        a, b = empty(2 * rank, hidden), empty(2 * rank, 2 * size).zero_()
        for half, projection in enumerate(("gate", "up")):
            rows = slice(half * rank, (half + 1) * rank)
            a[:, rows] = lora.a[projection]
            lora.folded(projection, 1.0, b[:, rows, half * size : (half + 1) * size].transpose(1, 2))
        down_a, down_b = empty(rank, size).copy_(lora.a["down"]), empty(rank, hidden)
        lora.folded("down", 1.0, down_b.transpose(1, 2))
        self.nbytes = sum(tensor.nbytes for tensor in (a, b, down_a, down_b))
        self.each: list[Factors] = list(zip(a.transpose(1, 2), b, down_a.transpose(1, 2), down_b, strict=True))
        """taking an expert's out of the whole would cost every token a step"""
