"""One layer of experts: random weights, LoRA and tokens for it, engines that compute it, and a float64 sum to compare
them with."""

from __future__ import annotations

import torch

from llamafactory_kt.adapters import ExpertLora, ExpertsShape
from llamafactory_kt.checkpoint.expert_weights import ExpertWeights, LayerWeights
from llamafactory_kt.engines.base import Engine
from llamafactory_kt.engines.options import EngineOptions, EngineSpec
from llamafactory_kt.engines.registry import get_engine

TOP_K = 3


def layer(shape: ExpertsShape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size

    def random(*size):
        return (torch.randn(*size, generator=generator) * size[-1] ** -0.5).to(torch.bfloat16)

    return LayerWeights(random(e, i, h), random(e, i, h), random(e, h, i))


def lora_for(shape: ExpertsShape, rank: int, scaling: float, seed=1) -> ExpertLora:
    generator = torch.Generator().manual_seed(seed)
    a, b, factors = {}, {}, {}
    for projection in ("gate", "up", "down"):
        out, size = shape.projection(projection)
        a[projection] = (torch.randn(shape.num_experts, rank, size, generator=generator) * size**-0.5).bfloat16()
        b[projection] = (torch.randn(shape.num_experts, out, rank, generator=generator) * rank**-0.5).bfloat16()
        factors[projection] = torch.full((shape.num_experts, rank), scaling, dtype=torch.float64)
    return ExpertLora(0, a, b, factors)


def reference(weights: LayerWeights, lora: ExpertLora | None, x, index, scores):
    """sum_k score * down(silu(gate x) * up x), token by token in float64."""
    full = {"gate": weights.gate.double(), "up": weights.up.double(), "down": weights.down.double()}
    if lora is not None:
        for p in full:
            full[p] = full[p] + (lora.b[p].double() * lora.scaling[p][:, None]) @ lora.a[p].double()
    out = torch.zeros_like(x, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for expert, score in zip(index[token].tolist(), scores[token].double(), strict=True):
            gate = full["gate"][expert] @ row
            out[token] += score * (full["down"][expert] @ (gate * torch.sigmoid(gate) * (full["up"][expert] @ row)))
    return out


def make_engine(kind: str, shape: ExpertsShape, weights: LayerWeights, *, rank=8, scaling=1.0, chunk=16) -> Engine:
    """The engine of this name, with the weights loaded."""

    def read(dtype):
        for expert in map(ExpertWeights, weights.gate, weights.up, weights.down):
            given = ExpertWeights(*(matrix.clone() for matrix in expert))
            yield given
            for matrix in given:
                matrix.fill_(torch.nan)  # as a mapped file's pages, which are gone when the next expert is read

    spec = EngineSpec(0, shape, TOP_K, rank, scaling)
    engine = get_engine(kind)(spec, read, EngineOptions(max_chunk=chunk))
    engine.load()
    return engine


def batch(shape: ExpertsShape, tokens: int, seed=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(shape.num_experts, generator=generator)[:TOP_K] for _ in range(tokens)])
    return x, index, torch.rand(tokens, TOP_K, generator=generator)
