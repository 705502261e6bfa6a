"""Some experts' rows in TorchScript.

Threads that compute experts by themselves (:mod:`.schedule`) would wait for Python's global lock at each of its steps, and a step computes
little; a compiled function is one step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ...matmul.linear import product

# ruff: noqa: B905 - TorchScript's zip has no strict

Lora = tuple[Tensor, Tensor, Tensor, Tensor]
"""as :data:`~.lora.Factors`, which TorchScript does not resolve"""


def experts(
    hidden: Tensor, tokens: Tensor, scores: Tensor, rows: list[int], gate_up: list[Tensor], down: list[Tensor],
    lora: list[Lora], wide: bool, numbers: Tensor, threads: int, out: Tensor,
) -> None:  # fmt: skip
    """Compute ``scores * expert(hidden[tokens])`` of each expert's rows, which lie one after the other.

    Each step is taken for all experts before the next: after another small product, a small product finds its instructions in the
    cache; after a weight has been read, it does not.

    Args:
        hidden: [T, H], bfloat16.
        tokens: [n], scores: [n, 1] float32, out: [n, H] float32, which is written.
        rows: number of rows of each expert, n in total.
        gate_up: each expert's weight [2I, H] and down: [H, I], plain or packed, as :func:`~llamafactory_kt.matmul.linear.product` takes them.
        lora: each expert's, or none at all.
        wide: compute in float32.
        numbers: row numbers for the larger weight (:func:`~llamafactory_kt.matmul.linear.numbers`).
        threads: number of threads that compute.
    """
    x = hidden.index_select(0, tokens)
    if wide:
        x = x.float()
    inner = _products(x, rows, gate_up, wide, numbers, threads)
    if len(lora) > 0:
        inner = inner.float()
        for (a, b, _, _), part, own in zip(lora, x.float().split(rows), inner.split(rows)):
            own.addmm_(part.mm(a), b)
    gate, up = inner.chunk(2, dim=-1)
    inner = F.silu(gate).mul_(up)
    found = _products(inner.to(x.dtype), rows, down, wide, numbers, threads)
    if len(lora) > 0:
        found = found.float()
        for (_, _, a, b), part, own in zip(lora, inner.split(rows), found.split(rows)):
            own.addmm_(part.mm(a), b)
    torch.mul(found, scores, out=out)


def _products(x: Tensor, rows: list[int], weights: list[Tensor], wide: bool, numbers: Tensor, threads: int) -> Tensor:
    found = [product(part, weights[number], None, wide, numbers, threads) for number, part in enumerate(x.split(rows))]
    return found[0] if len(found) == 1 else torch.cat(found)


@cache
def scripted_experts() -> Callable[..., None]:
    """:func:`experts`, compiled."""
    return torch.jit.script(experts)  # type: ignore[no-any-return]
