"""Some experts' rows in TorchScript.

Threads that compute experts by themselves (:mod:`.schedule`) would wait for Python's global lock at each of its steps, and a step computes
little; a compiled function is one step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F

from ...matmul.linear import product

# ruff: noqa: B905 - TorchScript's zip has no strict

Lora = tuple[Tensor, Tensor, Tensor, Tensor]
"""as :data:`~.lora.Factors`, which TorchScript does not resolve"""
Biases = tuple[Tensor, Tensor]
"""of gate and up side by side [2I], and of down [H], float32"""


def experts(
    hidden: Tensor, tokens: Tensor, scores: Tensor, rows: list[int], gate_up: list[Tensor], down: list[Tensor],
    lora: list[Lora], biases: list[Biases], wide: bool, numbers: Tensor, threads: int, out: Tensor, has_gate: bool,
    activation: str, alpha: float, limit: float, limit_activated: bool, up_offset: float,
) -> None:  # fmt: skip
    """Compute ``scores * expert(hidden[tokens])`` of each expert's rows, which lie one after the other.

    Each step is taken for all experts before the next: after another small product, a small product finds its instructions in the
    cache; after a weight has been read, it does not.

    Args:
        hidden: [T, H], bfloat16.
        tokens: [n], scores: [n, 1] float32, out: [n, H] float32, which is written.
        rows: number of rows of each expert, n in total.
        gate_up: each expert's weight [2I, H] and down: [H, I], plain or packed, as :func:`~llamafactory_kt.matmul.linear.product` takes them.
        lora: each expert's, or none at all; biases likewise.
        wide: compute in float32.
        numbers: row numbers for the larger weight (:func:`~llamafactory_kt.matmul.linear.numbers`).
        threads: number of threads that compute.
        has_gate: and the others as in :class:`~llamafactory_kt.checkpoint.formula.ExpertFormula`; limit is infinite where there is none.
    """
    x = hidden.index_select(0, tokens)
    if wide:
        x = x.float()
    inner = _products(x, rows, gate_up, wide, numbers, threads)
    if len(lora) > 0:
        inner = inner.float()
        for (a, b, _, _), part, own in zip(lora, x.float().split(rows), inner.split(rows)):
            own.addmm_(part.mm(a), b)
    if len(biases) > 0:
        inner = inner.float()
        for (bias, _), own in zip(biases, inner.split(rows)):
            own.add_(bias)
    if has_gate:
        gate, up = inner.chunk(2, dim=-1)
        if limit < inf:
            up = up.clamp(min=-limit, max=limit)
            gate = gate if limit_activated else gate.clamp(max=limit)
        if up_offset != 0:
            up = up + up_offset
        inner = _activated(gate, activation, alpha)
        if limit_activated:
            inner.clamp_(max=limit)
        inner.mul_(up)
    else:
        inner = _activated(inner, activation, alpha)
    found = _products(inner.to(x.dtype), rows, down, wide, numbers, threads)
    if len(lora) > 0:
        found = found.float()
        for (_, _, a, b), part, own in zip(lora, inner.split(rows), found.split(rows)):
            own.addmm_(part.mm(a), b)
    if len(biases) > 0:
        found = found.float()
        for (_, bias), own in zip(biases, found.split(rows)):
            own.add_(bias)
    torch.mul(found, scores, out=out)


def _activated(x: Tensor, activation: str, alpha: float) -> Tensor:
    """A new tensor."""
    if activation == "silu":
        return F.silu(x) if alpha == 1 else torch.sigmoid(alpha * x).mul_(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.relu(x) if activation == "relu" else F.relu(x).square()


def _products(x: Tensor, rows: list[int], weights: list[Tensor], wide: bool, numbers: Tensor, threads: int) -> Tensor:
    found = [product(part, weights[number], None, wide, numbers, threads) for number, part in enumerate(x.split(rows))]
    return found[0] if len(found) == 1 else torch.cat(found)


@cache
def scripted_experts() -> Callable[..., None]:
    """:func:`experts`, compiled."""
    return torch.jit.script(experts)  # type: ignore[no-any-return]
