"""Products of each head's input with its own part of a weight, LoRA included, as one call of the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .fused_linear import Factors
from .library import DTYPES, HeadsCall, byref, in_panels, kernels
from .recording import active
from .scratch import scratch


class HeadProducts:
    """``W[h] x[h] + scaling B[h] (A x[h])`` of each head h, with the LoRA of any number of adapters; sums are float32.

    Args:
        weight: [heads, rows, cols], the last dimension contiguous; read where it lies, and kept.
        factors: of each adapter: A [r, cols], B [heads, rows, r] and the scaling; copied.
        transposed: compute ``W[h]^T x[h] + scaling A^T (B[h]^T x[h])`` instead.
    """

    def __init__(self, weight: torch.Tensor, factors: Sequence[Factors] = (), *, transposed: bool = False):
        a = b = None
        if factors:
            a = torch.cat([a.detach().float() for a, _, _ in factors])
            b = torch.cat([scaling * b.detach().float() for _, b, scaling in factors], -1)
            b = b.contiguous() if transposed else in_panels(b)
        self._kept = weight, a, b
        heads, rows, cols = weight.shape
        self.call = HeadsCall(
            heads, rows, cols, len(a) if a is not None else 0, DTYPES[weight.dtype], transposed, weight.data_ptr(), *weight.stride()[:2],
            *(t.data_ptr() if t is not None else None for t in (a, b)),
        )  # fmt: skip
        self._reference = byref(self.call)
        self._out = cols if transposed else rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., heads, cols] -> [..., heads, rows], in the dtype of x; transposed, the other way round."""
        x = x if x.is_contiguous() else x.contiguous()
        tokens, threads = x[..., 0, 0].numel(), torch.get_num_threads()
        out = torch.empty(*x.shape[:-1], self._out, dtype=x.dtype)
        memory = scratch(kernels().kt_heads_scratch(self._reference, tokens, threads))
        kernels().kt_heads_forward(
            self._reference, x.data_ptr(), DTYPES[x.dtype], tokens, out.data_ptr(), memory, threads
        )
        if active.recorder is not None:
            active.recorder.note("heads", self, (x,), out)
        return out
