"""Experts in plain PyTorch with float32 accumulation: the oracle, and the fallback on CPUs without a kernel."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..adapters import ExpertLora
from ..checkpoint.expert_weights import ExpertWeights
from ..checkpoint.formula import ExpertFormula
from .base import Engine, Undo
from .product import Product


class ReferenceEngine(Engine):
    """Keeps the weights in the checkpoint's dtype and computes each expert that was hit in float32."""

    name = "torch"
    fallback = shares = True
    multiplied = torch.float32
    """dtype of the products' factors"""

    _lora: ExpertLora | None = None

    @classmethod
    def cannot_compute(cls, formula: ExpertFormula) -> str | None:
        return None

    def load(self) -> None:
        self._biases = self.spec.read_biases()
        self._weights = [
            ExpertWeights(*(matrix.clone(memory_format=torch.contiguous_format) for matrix in expert))
            for expert in self.read_experts(self.weights_dtype)
        ]

    def set_lora(self, lora: ExpertLora | None) -> Undo:
        before = self._lora
        self._put(lora)
        return lambda: self._put(before)

    def _put(self, lora: ExpertLora | None) -> None:
        self._lora, self.lora_rank = lora, lora.rank if lora else 0

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        scores, out = weights.float(), torch.zeros(hidden.shape, dtype=torch.float32)
        for expert in index[index >= 0].unique().tolist():
            token, slot = torch.where(index == expert)
            rows = hidden[token].float()
            gate, up = self._linear("gate", expert, rows), self._linear("up", expert, rows)
            down = self._linear("down", expert, self.spec.formula.activate(gate, up))
            out.index_add_(0, token, down * scores[token, slot, None])
        return out.to(hidden.dtype)

    def _linear(self, projection: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(self._weights[expert], projection)
        out = F.linear(x.to(self.multiplied), weight.to(self.multiplied)).float()
        if self._biases is not None:
            out += getattr(self._biases, projection)[expert]
        if self._lora is not None:
            a, b = self._lora.a[projection][expert].float(), self._lora.b[projection][expert].float()
            out += F.linear(F.linear(x, a) * self._lora.scaling[projection][expert].float(), b)
        return out

    def product(self, projection: str, expert: int) -> Product:
        bias = getattr(self._biases, projection)[expert] if self._biases is not None else None
        a = b = None
        if self._lora is not None:
            a = self._lora.a[projection][expert]
            b = self._lora.b[projection][expert].float() * self._lora.scaling[projection][expert].float()
        return Product(getattr(self._weights[expert], projection), bias, a, b)

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for expert in (*self._weights, self._biases or ()) for matrix in expert)

    @property
    def lora_nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._lora.a.values(), *self._lora.b.values())) if self._lora else 0
