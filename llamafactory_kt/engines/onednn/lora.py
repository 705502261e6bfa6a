"""The LoRA of a layer's experts, as the oneDNN engine multiplies it."""

from __future__ import annotations

import torch

from ...adapters import ExpertLora, ExpertsShape
from ...ground.paging import in_huge_pages

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""one expert's: A of gate and up side by side [H, 2r], B of both block-diagonal [2r, 2I], or without a gate those of up [H, r] and
[r, I]; A [I, r] and B [r, H] of down"""


def lora_size(shape: ExpertsShape, rank: int) -> int:
    """Bytes of a :class:`PackedLora`."""
    return 4 * shape.num_experts * rank * (3 * shape.hidden_size + 5 * shape.intermediate_size)


class PackedLora:
    """float32, which is faster than bfloat16 for products of this size, with the scaling folded into B.

    Args:
        lora: the layer's LoRA, any dtype.
    """

    def __init__(self, lora: ExpertLora):
        experts, rank, hidden = lora.a["up"].shape
        size = lora.a["down"].shape[2]
        inner = [projection for projection in ("gate", "up") if lora.b[projection].shape[1]]

        def empty(*shape: int) -> torch.Tensor:
            return in_huge_pages(torch.empty(experts, *shape, dtype=torch.float32, device="cpu"))

        # Reading the zeros beside the diagonal is cheaper than calling a second product.
        a, b = empty(len(inner) * rank, hidden), empty(len(inner) * rank, len(inner) * size).zero_()
        for half, projection in enumerate(inner):
            rows = slice(half * rank, (half + 1) * rank)
            a[:, rows] = lora.a[projection]
            lora.folded(projection, 1.0, b[:, rows, half * size : (half + 1) * size].transpose(1, 2))
        down_a, down_b = empty(rank, size).copy_(lora.a["down"]), empty(rank, hidden)
        lora.folded("down", 1.0, down_b.transpose(1, 2))
        self.nbytes = sum(tensor.nbytes for tensor in (a, b, down_a, down_b))
        self.each: list[Factors] = list(zip(a.transpose(1, 2), b, down_a.transpose(1, 2), down_b, strict=True))
        """of each expert, so that no token pays for slicing"""
