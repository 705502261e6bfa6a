"""The one in-memory form of routed-expert LoRA, whatever file it came from, and the sizes of the experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from .fused_layout import USUAL, FusedLayout
from .keys import PROJECTIONS


@dataclass(frozen=True)
class ExpertsShape:
    """Sizes of one layer's routed experts, and how the model stores them."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool = True
    """without it, gate has no rows: all its tensors are empty"""
    fused: FusedLayout = USUAL
    """of the model's parameters; adapters on them depend on it"""

    @property
    def projections(self) -> tuple[str, ...]:
        """Those that have rows."""
        return PROJECTIONS if self.has_gate else PROJECTIONS[1:]

    @property
    def num_weights(self) -> int:
        """Parameters in gate, up and down of all experts."""
        return len(self.projections) * self.num_experts * self.hidden_size * self.intermediate_size

    def projection(self, name: str) -> tuple[int, int]:
        """(out, in) features of ``gate``, ``up``, ``down`` or ``gate_up``, the rows of both."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        if name == "down":
            return hidden, intermediate
        if name == "gate_up":
            return (len(self.projections) - 1) * intermediate, hidden
        return intermediate if name in self.projections else 0, hidden


@dataclass(frozen=True)
class ExpertLora:
    """LoRA of one layer's routed experts: for expert e and projection p, ``ΔW = b[p][e] @ diag(scaling[p][e]) @ a[p][e]``.

    Experts or projections without LoRA are zeros, and so is the padding of smaller ranks. Each rank has its own scaling,
    so that the sum of several LoRA is one LoRA with their ranks side by side.
    """

    layer: int
    a: dict[str, torch.Tensor]
    """per projection [E, r, in]; in is H for gate and up, I for down"""
    b: dict[str, torch.Tensor]
    """per projection [E, out, r]; out is I for gate and up, H for down"""
    scaling: dict[str, torch.Tensor]
    """per projection [E, r], float64"""

    @classmethod
    def zeros(cls, layer: int, shape: ExpertsShape, rank: int, dtype: torch.dtype, scaling: float) -> ExpertLora:
        """LoRA that changes nothing, on the CPU, with the same scaling for all ranks."""
        experts, sizes = shape.num_experts, {p: shape.projection(p) for p in PROJECTIONS}
        return cls(
            layer,
            {p: torch.zeros(experts, rank, width, dtype=dtype) for p, (_, width) in sizes.items()},
            {p: torch.zeros(experts, out, rank, dtype=dtype) for p, (out, _) in sizes.items()},
            {p: torch.full((experts, rank), scaling, dtype=torch.float64) for p in sizes},
        )

    @classmethod
    def sum_of(cls, loras: Sequence[ExpertLora]) -> ExpertLora:
        """The LoRA whose ΔW is exactly the sum of the given ones; all belong to the same layer."""
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

        If all ranks share one scaling, as within one adapter, it multiplies the product, as in PEFT.
        """
        a, b = self.a[projection][expert].float(), self.b[projection][expert].float()
        scaling = self.scaling[projection][expert].float()
        first = scaling[..., :1]
        return first[..., None] * (b @ a) if bool((scaling == first).all()) else (b * scaling[..., None, :]) @ a

    def fused_delta(self, weight: str, layout: FusedLayout, expert: int | slice) -> torch.Tensor:
        """ΔW of ``gate_up_proj``, ``up_proj`` or ``down_proj``, as the model stores it, of one expert or a slice of them, float32."""
        if weight == "down_proj":
            delta = self.delta("down", expert)
        else:
            gate, up = self.delta("gate", expert), self.delta("up", expert)
            delta = layout.join(gate, up, gate.dim() - 2)
        return delta.transpose(-1, -2) if layout.transposed else delta

    def norms(self) -> torch.Tensor:
        """Frobenius norm of each expert's ΔW over its three projections, [E], float64.

        ``‖B S A‖² = Σ (BᵀB) ∘ (S A AᵀS)``, so no ΔW is formed.
        """
        squares = torch.zeros(self.a["gate"].shape[0], dtype=torch.float64)
        for projection in PROJECTIONS:
            a, b = self.a[projection].double() * self.scaling[projection][..., None], self.b[projection].double()
            squares += ((b.transpose(1, 2) @ b) * (a @ a.transpose(1, 2))).sum((1, 2))
        return squares.clamp_(min=0).sqrt_()

    def folded(self, projection: str, common: float, out: torch.Tensor | None = None) -> torch.Tensor:
        """B times its scaling divided by ``common``, [E, out, r], float32; written to ``out`` if given.

        A power of two is exact in every floating-point type; any other factor is rounded once, to float32.
        """
        b = self.b[projection]
        out = torch.empty_like(b, dtype=torch.float32) if out is None else out
        return out.copy_(b).mul_((self.scaling[projection] / common).to(torch.float32)[:, None])


def common_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The dtype that they share, else the narrowest that holds them all exactly.

    >>> common_dtype([torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.bfloat16)])
    torch.float32
    """
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def mantissa(scaling: float) -> float:
    """``|scaling|`` without its power of two, in [1, 2).

    A kernel with one scaling per layer is built with it, so that folding the rest into B is exact.

    >>> mantissa(2.0), mantissa(0.25), mantissa(16 / 5)
    (1.0, 1.0, 1.6)
    """
    return 2 * math.frexp(abs(scaling))[0] or 1.0
