"""Experts in torch's own bfloat16 kernels (oneDNN), their weights where those read them fastest.

kt-kernel's workers spin between layers and take the cores from torch's threads; where cores are few and torch computes
the attention on them too, torch's own threads are faster. Packed or not, the memory is the same.
"""

from __future__ import annotations

from itertools import chain, islice

import torch
from torch.nn import functional as F

from ..adapters import ExpertLora, ExpertsShape
from ..adapters.keys import PROJECTIONS
from .engine import Engine, Undo
from .layer_tensors import ExpertWeights
from .packing import Size, faster_packed, linear, placing


def sampled(shape: ExpertsShape) -> int:
    """Experts whose products are timed: so many that caches do not hold them."""
    return max(1, min(8, shape.num_experts, 2**28 // (3 * shape.hidden_size * shape.intermediate_size * 2)))


class OneDNNEngine(Engine):
    """The checkpoint's weights in bfloat16, gate and up side by side; sums in float32 inside each product."""

    name = "oneDNN"

    _lora: list[tuple[torch.Tensor, ...]] | None = None
    _lora_nbytes = 0

    def load(self) -> None:
        shape = self.spec.shape
        sizes = (2 * shape.intermediate_size, shape.hidden_size), (shape.hidden_size, shape.intermediate_size)
        experts = iter(self._read_experts(torch.bfloat16))
        first: list[ExpertWeights] = []

        def sample() -> dict[Size, list[torch.Tensor]]:
            first.extend(ExpertWeights(*map(torch.clone, expert)) for expert in islice(experts, sampled(shape)))
            return {sizes[0]: [torch.cat((gate, up)) for gate, up, _ in first], sizes[1]: [e.down for e in first]}

        packed = faster_packed(sizes, sample)
        gate_up_place, down_place = (placing(size, shape.num_experts, size in packed) for size in sizes)
        self._weights = [
            (gate_up_place(number, gate, up), down_place(number, down))
            for number, (gate, up, down) in enumerate(chain(first, experts))
        ]

    def set_lora(self, lora: ExpertLora | None) -> Undo:
        before = self._lora, self._lora_nbytes, self.lora_rank
        self._lora = _lora_tensors(lora) if lora else None
        self._lora_nbytes = sum(tensor.nbytes for tensors in self._lora or () for tensor in tensors)
        self.lora_rank = lora.rank if lora else 0

        def undo() -> None:
            self._lora, self._lora_nbytes, self.lora_rank = before

        return undo

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # Each expert's tokens side by side: one product for all of them.
        experts = index.reshape(-1)
        order = experts.argsort(stable=True)
        token = order // index.shape[1]
        rows = hidden.to(torch.bfloat16)[token]
        counts = torch.bincount(experts, minlength=len(self._weights)).tolist()
        parts = rows.split([count for count in counts if count])
        hit = [expert for expert, count in enumerate(counts) if count]
        results = torch.cat([self._expert(expert, part) for expert, part in zip(hit, parts, strict=True)])
        scores = weights.reshape(-1)[order].float()
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        return out.index_add_(0, token, results.float() * scores[:, None]).to(hidden.dtype)

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x [n, H] bf16 -> [n, H] float32, or bf16 without LoRA."""
        gate_up_weight, down_weight = self._weights[expert]
        gate_up = linear(x, gate_up_weight)
        if self._lora is None:
            gate, up = gate_up.chunk(2, dim=-1)
            return linear(F.silu(gate).mul_(up), down_weight)
        a, gate_b, up_b, down_a, down_b = self._lora[expert]
        gate, up = gate_up.float().chunk(2, dim=-1)
        gate_low, up_low = F.linear(x.float(), a).chunk(2, dim=-1)
        inner = F.silu(gate.addmm_(gate_low, gate_b)).mul_(up.addmm_(up_low, up_b))
        return linear(inner.to(torch.bfloat16), down_weight).float().addmm_(F.linear(inner, down_a), down_b)

    @property
    def nbytes(self) -> int:
        shape = self.spec.shape
        return 3 * shape.num_experts * shape.hidden_size * shape.intermediate_size * 2

    @property
    def lora_nbytes(self) -> int:
        return self._lora_nbytes


def _lora_tensors(lora: ExpertLora) -> list[tuple[torch.Tensor, ...]]:
    """Per expert: A of gate and up [2r, H], their B [r, I], A of down [r, I], its B [r, H], scaling multiplied into B.

    In float32, whose products of this size take a third of the time of bfloat16's.
    """
    b = {projection: lora.folded(projection, 1.0).transpose(1, 2).contiguous() for projection in PROJECTIONS}
    a = torch.cat((lora.a["gate"], lora.a["up"]), dim=1).float()
    return list(zip(a, b["gate"], b["up"], lora.a["down"].float(), b["down"], strict=True))
