"""Experts in torch's own kernels (oneDNN), their bfloat16 weights where those read them fastest.

kt-kernel's workers spin between layers and take the cores from torch's threads; where cores are few and torch computes
the attention on them too, torch's own threads are faster. Packed or not, the memory is the same.
"""

from __future__ import annotations

from itertools import chain, islice

import torch
from torch.nn import functional as F

from ..adapters import ExpertLora, ExpertsShape
from .engine import Engine, Undo
from .grouped_lora import GroupedLora, add_lora, batches
from .layer_tensors import ExpertWeights
from .packing import Size, faster_packed, placing
from .products import computed_in, linear

ROWS_PER_THREAD = 64
"""that are computed together: the 1 MiB of cache of a thread's core holds them at each step"""


def sampled(shape: ExpertsShape) -> int:
    """Experts whose products are timed: so many that caches do not hold them."""
    return max(1, min(8, shape.num_experts, 2**28 // (3 * shape.hidden_size * shape.intermediate_size * 2)))


class OneDNNEngine(Engine):
    """The checkpoint's weights in bfloat16, gate and up side by side; sums in float32 inside each product."""

    name = "oneDNN"

    _lora: GroupedLora | None = None

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
        before = self._lora, self.lora_rank
        self._lora = GroupedLora(lora) if lora else None
        self.lora_rank = lora.rank if lora else 0

        def undo() -> None:
            self._lora, self.lora_rank = before

        return undo

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # Each expert's tokens side by side: one product for all of them.
        experts = index.reshape(-1)
        order = experts.argsort(stable=True)
        groups = _groups(torch.bincount(experts, minlength=len(self._weights)).tolist())
        sizes = [sum(group.values()) for group in groups]
        tokens = (order // index.shape[1]).split(sizes)
        scores = weights.reshape(-1)[order].float()[:, None].split(sizes)
        x, out = hidden.to(torch.bfloat16), torch.zeros(hidden.shape, dtype=torch.float32)
        for group, token, score in zip(groups, tokens, scores, strict=True):
            out.index_add_(0, token, self._compute(group, x[token]) * score)
        return out.to(hidden.dtype)

    def _compute(self, group: dict[int, int], x: torch.Tensor) -> torch.Tensor:
        """x [n, H] bf16, the rows of each expert of the group in turn -> [n, H] float32, or without LoRA what the products
        are computed in."""
        x = x.to(computed_in(max(group.values())))
        gate_up = self._products(0, group, x)
        if self._lora is None:
            return self._products(1, group, _gated(gate_up))
        together = batches(group)
        inner = _gated(add_lora(self._lora.gate_up, together, x.float(), gate_up.float()))
        return add_lora(self._lora.down, together, inner, self._products(1, group, inner.to(x.dtype)).float())

    def _products(self, which: int, group: dict[int, int], x: torch.Tensor) -> torch.Tensor:
        """Each expert's rows of x with its own weight: gate and up (0), or down (1)."""
        parts = x.split(list(group.values()))
        results = [linear(part, self._weights[expert][which]) for expert, part in zip(group, parts, strict=True)]
        return torch.cat(results) if len(results) > 1 else results[0]

    @property
    def nbytes(self) -> int:
        shape = self.spec.shape
        return 3 * shape.num_experts * shape.hidden_size * shape.intermediate_size * 2

    @property
    def lora_nbytes(self) -> int:
        return self._lora.nbytes if self._lora else 0


def _groups(counts: list[int]) -> list[dict[int, int]]:
    """The experts that have rows, in turn, with how many; several in one group where they have few.

    Each step takes a group at a time: with fewer rows in it, calling it is what it costs; with more, its results leave
    the CPU's cache before the next step reads them.
    """
    groups: list[dict[int, int]] = []
    together, most = 0, ROWS_PER_THREAD * torch.get_num_threads()
    for expert, rows in enumerate(counts):
        if not rows:
            continue
        together += rows
        if groups and together <= most:
            groups[-1][expert] = rows
        else:
            groups.append({expert: rows})
            together = rows
    return groups


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    """[n, 2I] -> [n, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
