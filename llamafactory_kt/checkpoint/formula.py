"""What one routed expert computes: a closed set of formulas, of which each engine says which it can compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
"""``x * sigmoid(alpha * x)``; GELU, exact and by tanh; ``max(x, 0)`` and its square"""


@dataclass(frozen=True)
class ExpertFormula:
    """``down(activation(gate x) * up x)``, or ``down(activation(up x))`` without a gate, for x [H]. Some models deviate:

    - gpt-oss: ``alpha`` 1.702, ``limit`` 7, ``up_offset`` 1, biases (``GptOssExperts`` in transformers);
    - DeepSeek-V4: ``limit``, and Step-3.7: ``limit`` with ``limit_activated``;
    - Nemotron-H: no gate.

    >>> print(ExpertFormula())
    down(silu(gate x) * up x)
    >>> print(ExpertFormula("silu", alpha=1.702, limit=7.0, up_offset=1.0, has_biases=True))
    down(silu(min(gate x, 7), alpha 1.702) * (clamp(up x, ±7) + 1)) with biases
    """

    activation: str = "silu"
    """one of :data:`ACTIVATIONS`"""
    has_gate: bool = True
    alpha: float = 1.0
    """SiLU's factor inside of the sigmoid"""
    limit: float | None = None
    """of gate from above, and of up on both sides; None: not limited"""
    limit_activated: bool = False
    """gate is limited after its activation, not before"""
    up_offset: float = 0.0
    """added to up after it has been limited"""
    has_biases: bool = False
    """each product has a bias"""

    def __str__(self) -> str:
        inner, up = ("gate x", "up x") if self.has_gate else ("up x", "")
        limited = self.limit is not None
        if limited:
            up = f"clamp({up}, ±{self.limit:g})"
        if limited and not self.limit_activated:
            inner = f"min({inner}, {self.limit:g})"
        if self.up_offset:
            up = f"({up} + {self.up_offset:g})"
        value = f"{self.activation}({inner}{'' if self.alpha == 1 else f', alpha {self.alpha:g}'})"
        if limited and self.limit_activated:
            value = f"min({value}, {self.limit:g})"
        return f"down({value}{f' * {up}' if self.has_gate else ''}){' with biases' if self.has_biases else ''}"

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """gate and up [..., I], with their biases -> what ``down`` multiplies, [..., I]. Without a gate, ``gate`` is not used."""
        if not self.has_gate:
            return activation(up, self.activation, self.alpha)
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
            gate = gate if self.limit_activated else gate.clamp(max=self.limit)
        value = activation(gate, self.activation, self.alpha)
        if self.limit is not None and self.limit_activated:
            value = value.clamp(max=self.limit)
        return value * (up + self.up_offset)


PLAIN = ExpertFormula()
"""``down(silu(gate x) * up x)``, which every engine computes"""


def activation(x: torch.Tensor, name: str, alpha: float = 1.0) -> torch.Tensor:
    """One of :data:`ACTIVATIONS`, elementwise."""
    if name in ("relu", "relu2"):
        return F.relu(x) if name == "relu" else F.relu(x).square()
    if name == "silu":
        return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
