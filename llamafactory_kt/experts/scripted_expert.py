"""One expert's tokens in TorchScript.

Threads that compute experts side by side (:mod:`.side_by_side`) all need Python's lock for each step that Python takes. On 16
cores, waiting for it cost 40 microseconds a step, and a step computes little more than that; a compiled function is one step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .products import product

Lora = tuple[Tensor, Tensor, Tensor, Tensor]


def expert(
    hidden: Tensor, tokens: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, lora: Lora | None, wide: bool,
    numbers: Tensor, threads: int, out: Tensor,
) -> None:  # fmt: skip
    """Compute ``scores * expert(hidden[tokens])``.

    Args:
        hidden: [T, H], bfloat16.
        tokens: [n], scores: [n, 1] float32, out: [n, H] float32, which is written.
        gate_up: [2I, H] and down: [H, I], plain or packed, as :func:`~.products.product` takes them.
        lora: as :data:`~.held_lora.Factors`.
        wide: compute in float32.
        numbers: those of the larger weight.
        threads: that compute.
    """
    x = hidden.index_select(0, tokens)
    if wide:
        x = x.float()
    inner = product(x, gate_up, None, wide, numbers, threads)
    if lora is not None:
        inner = inner.float().addmm_(x.float().mm(lora[0]), lora[1])
    gate, up = inner.chunk(2, dim=-1)
    inner = F.silu(gate).mul_(up)
    found = product(inner.to(x.dtype), down, None, wide, numbers, threads)
    if lora is not None:
        found = found.float().addmm_(inner.mm(lora[2]), lora[3])
    torch.mul(found, scores, out=out)


@cache
def scripted_expert() -> Callable[..., None]:
    """:func:`expert`, compiled."""
    return torch.jit.script(expert)  # type: ignore[no-any-return]
