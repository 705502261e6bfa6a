"""The engine on PyTorch's own kernels (oneDNN), with bfloat16 weights in the layout that is read fastest.

It has no worker threads that spin between layers, which is faster where cores are few and PyTorch computes the attention on them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain, islice

import torch

from ...adapters import ExpertLora, ExpertsShape
from ...checkpoint.formula import ExpertFormula
from ...checkpoint.reader import ExpertWeights
from ...matmul.layouts import Size, faster_packed, placing
from ...matmul.linear import computed_in, numbers
from ...matmul.mkldnn_ops import onednn_problem
from ...matmul.packed_weight import for_kernels
from ..base import Engine, EngineOptions, LayerMemory, Undo
from .lora import PackedLora, lora_size
from .schedule import Part, compute, parts, together
from .script import scripted_experts

RESULTS = 2**26
"""most bytes of experts' outputs that are kept until they are added up"""


def sampled(shape: ExpertsShape) -> int:
    """Number of experts that are timed: more than caches hold."""
    return max(1, min(8, shape.num_experts, 2**27 // (shape.num_weights // shape.num_experts)))


class OneDNNEngine(Engine):
    """bfloat16 weights, gate and up side by side; float32 sums inside each product."""

    name = "oneDNN"
    bits = 16
    weights_dtype = torch.bfloat16

    _lora: PackedLora | None = None

    @classmethod
    def problem(cls) -> str | None:
        return onednn_problem()

    @classmethod
    def cannot_compute(cls, formula: ExpertFormula) -> str | None:
        return None

    @classmethod
    def auto(cls, merged: bool) -> bool:
        return True

    @classmethod
    def memory(cls, shape: ExpertsShape, rank: int, itemsize: int, options: EngineOptions) -> LayerMemory:
        """Experts are read one at a time; some of them are copied, to time plain and packed weights."""
        weights = 2 * shape.num_weights
        return LayerMemory(weights, lora_size(shape, rank), 4 * sampled(shape) * weights // shape.num_experts)

    def load(self) -> None:
        shape, formula = self.spec.shape, self.spec.formula
        inner = (len(shape.projections) - 1) * shape.intermediate_size  # rows of gate and up
        sizes = (inner, shape.hidden_size), (shape.hidden_size, shape.intermediate_size)
        experts = iter(self.read_experts(torch.bfloat16))
        first: list[ExpertWeights] = []

        def sample() -> dict[Size, list[torch.Tensor]]:
            first.extend(ExpertWeights(*map(torch.clone, expert)) for expert in islice(experts, sampled(shape)))
            return {sizes[0]: [torch.cat((gate, up)) for gate, up, _ in first], sizes[1]: [e.down for e in first]}

        packed = faster_packed(sizes, sample)
        gate_up_place, down_place = (placing(size, shape.num_experts, size in packed) for size in sizes)
        self._weights = [
            (for_kernels(gate_up_place(number, gate, up)), for_kernels(down_place(number, down)))
            for number, (gate, up, down) in enumerate(chain(first, experts))
        ]
        self._numbers = max(map(numbers, self._weights[0]), key=len)
        biases = self.spec.read_biases()
        self._biases = list(zip(torch.cat(biases[:2], 1), biases.down, strict=True)) if biases is not None else []
        limit = math.inf if formula.limit is None else formula.limit
        gate = formula.has_gate, formula.activation, formula.alpha, limit, formula.limit_activated
        self._formula = *gate, formula.up_offset

    def set_lora(self, lora: ExpertLora | None) -> Undo:
        before = self._lora, self.lora_rank
        self._lora, self.lora_rank = (PackedLora(lora), lora.rank) if lora else (None, 0)

        def undo() -> None:
            self._lora, self.lora_rank = before

        return undo

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        experts = index.reshape(-1)
        order = experts.argsort(stable=True)  # each expert's rows side by side
        tokens, scores = order // index.shape[1], weights.reshape(-1)[order].float()[:, None]
        x, sums = hidden.to(torch.bfloat16), torch.zeros(hidden.shape, dtype=torch.float32)
        counts, threads = torch.bincount(experts).tolist(), torch.get_num_threads()
        for some in together(parts(counts, threads), RESULTS // (4 * sums.shape[1])):
            rows = slice(some[0].start, some[-1].stop)
            found = torch.empty(rows.stop - rows.start, sums.shape[1], dtype=torch.float32)
            compute(some, threads, self._experts(x, tokens[rows], scores[rows], found, rows.start))
            sums.index_add_(0, tokens[rows], found)
        return sums.to(hidden.dtype)

    def _experts(
        self, x: torch.Tensor, tokens: torch.Tensor, scores: torch.Tensor, found: torch.Tensor, first: int
    ) -> Callable[[Sequence[Part], int], None]:
        """A call that computes some parts with a number of threads; the tensors' rows begin with the first of all parts."""
        experts, each = scripted_experts(), self._lora.each if self._lora else None

        def call(some: Sequence[Part], threads: int) -> None:
            rows = slice(some[0].start - first, some[-1].stop - first)
            sizes = [part.stop - part.start for part in some]
            gate_up, down = zip(*(self._weights[part.expert] for part in some), strict=True)
            lora = [each[part.expert] for part in some] if each else []
            wide = computed_in(max(sizes)) == torch.float32
            given = x, tokens[rows], scores[rows], sizes
            biases = [self._biases[part.expert] for part in some] if self._biases else []
            experts(*given, gate_up, down, lora, biases, wide, self._numbers, threads, found[rows], *self._formula)

        return call

    @property
    def nbytes(self) -> int:
        return 2 * self.spec.shape.num_weights

    @property
    def lora_nbytes(self) -> int:
        return self._lora.nbytes if self._lora else 0
