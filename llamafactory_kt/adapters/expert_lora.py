"""The one in-memory form of routed-expert LoRA, whatever file it came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .keys import PROJECTIONS


@dataclass(frozen=True)
class ExpertLora:
    """LoRA of one layer's routed experts: for expert e and projection p, ``ΔW = b[p][e] @ diag(scaling[p][e]) @ a[p][e]``.

    Experts or projections without LoRA are zeros, and so is the padding of smaller ranks. Each rank has a scaling of
    its own, so that the sum of several LoRA is one LoRA whose ranks lie side by side.
    """

    layer: int
    a: dict[str, torch.Tensor]
    """per projection [E, r, in]; in is H for gate and up, I for down"""
    b: dict[str, torch.Tensor]
    """per projection [E, out, r]; out is I for gate and up, H for down"""
    scaling: dict[str, torch.Tensor]
    """per projection [E, r], float64"""

    @classmethod
    def sum_of(cls, loras: Sequence[ExpertLora]) -> ExpertLora:
        """The LoRA whose ΔW is the sum of the given ones', exactly; they belong to the same layer."""
        return cls(
            loras[0].layer,
            {p: torch.cat([lora.a[p] for lora in loras], dim=1) for p in PROJECTIONS},
            {p: torch.cat([lora.b[p] for lora in loras], dim=2) for p in PROJECTIONS},
            {p: torch.cat([lora.scaling[p] for lora in loras], dim=1) for p in PROJECTIONS},
        )

    @property
    def rank(self) -> int:
        return int(self.a["gate"].shape[1])

    def delta(self, projection: str, expert: int | slice) -> torch.Tensor:
        """ΔW of one expert [out, in], or of a slice of them [E, out, in], float32.

        Ranks that share a scaling, as those of one adapter do, are scaled after the product, in PEFT's order.
        """
        a, b = self.a[projection][expert].float(), self.b[projection][expert].float()
        scaling = self.scaling[projection][expert].float()
        first = scaling[..., :1]
        return first[..., None] * (b @ a) if bool((scaling == first).all()) else (b * scaling[..., None, :]) @ a

    def norms(self) -> torch.Tensor:
        """Frobenius norm of each expert's ΔW over its three projections, [E], float64.

        ``‖B S A‖² = Σ (BᵀB) ∘ (S A AᵀS)``, so that no ΔW is ever formed.
        """
        squares = torch.zeros(self.a["gate"].shape[0], dtype=torch.float64)
        for projection in PROJECTIONS:
            a, b = self.a[projection].double() * self.scaling[projection][..., None], self.b[projection].double()
            squares += ((b.transpose(1, 2) @ b) * (a @ a.transpose(1, 2))).sum((1, 2))
        return squares.clamp_(min=0).sqrt_()

    def folded(self, projection: str, common: float, out: torch.Tensor | None = None) -> torch.Tensor:
        """B of a projection with its scaling relative to ``common`` multiplied in, [E, out, r], float32; in ``out`` if given.

        A power of two is exact in every floating-point type; any other factor is rounded once, to float32.
        """
        b = self.b[projection]
        out = torch.empty_like(b, dtype=torch.float32) if out is None else out
        return out.copy_(b).mul_((self.scaling[projection] / common).to(torch.float32)[:, None])


def mantissa(scaling: float) -> float:
    """``scaling`` without its power of two, in [1, 2): what a kernel with one scaling per layer is built with,
    so that folding the rest into B is exact.

    >>> mantissa(2.0), mantissa(0.25), mantissa(16 / 5)
    (1.0, 1.0, 1.6)
    """
    return 2 * math.frexp(abs(scaling))[0] or 1.0
