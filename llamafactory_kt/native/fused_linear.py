"""A linear layer with its LoRA as one call of the kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .library import DTYPES, LinearCall, byref, in_panels, kernels
from .packed import call_of
from .recording import active
from .scratch import scratch

Factors = tuple[torch.Tensor, torch.Tensor, float]
"""A [r, in], B [out, r], and the scaling of their product"""


class Unchanged:
    """Whether tensors of which copies were made still hold what they held. What is written past PyTorch's counts (``.data``, views of NumPy) is
    not noticed."""

    def __init__(self, tensors: Iterable[torch.Tensor | None]):
        # tensors that were made in inference mode count no changes
        self._versions = [(t, t._version) for t in tensors if t is not None and not t.is_inference()]

    def __bool__(self) -> bool:
        return all(tensor._version == version for tensor, version in self._versions)


def fits(weight: torch.Tensor) -> bool:
    """Whether the kernels read such a weight where it lies."""
    return weight.device.type == "cpu" and weight.dim() == 2 and weight.dtype in DTYPES and weight.stride(1) == 1


class FusedLinear:
    """``W x + scaling B (A x) + bias``, with the LoRA of any number of adapters; sums are float32.

    Args:
        weight: [out, in], read where it lies, and kept; also a :class:`~.quantized_tensor.QuantizedTensor`.
        bias: [out], any dtype; copied.
        factors: of each adapter; copied.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, factors: Iterable[Factors] = ()):
        each = list(factors)
        a = torch.cat([a.detach().float() for a, _, _ in each]) if each else None
        b = in_panels(torch.cat([scaling * b.detach().float() for _, b, scaling in each], 1)) if each else None
        wide = bias.detach().float().clone() if bias is not None else None
        self.weight, self.address = weight, weight.data_ptr()
        self._kept, self._copied = (a, b, wide), Unchanged([bias, *(tensor for a, b, _ in each for tensor in (a, b))])
        dtype, packing, own = call_of(weight)
        own.a, own.b, own.bias = (t.data_ptr() if t is not None else None for t in (a, b, wide))
        self._rows, width = weight.shape
        self.call = LinearCall(self._rows, width, len(a) if a is not None else 0, dtype, packing, own)
        self._reference = byref(self.call)
        self._scratch: dict[tuple[int, int], int] = {}

    @staticmethod
    def takes(x: torch.Tensor) -> bool:
        """Whether the kernels read such an input."""
        return x.dtype in DTYPES and x.device.type == "cpu"

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether a weight is the one that is read, and bias and factors are as they were copied."""
        return self.address == weight.data_ptr() and bool(self._copied)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.is_contiguous() else rows.contiguous()
        size = tokens, threads = rows.shape[0], torch.get_num_threads()
        out = torch.empty(*x.shape[:-1], self._rows, dtype=x.dtype)
        if (needed := self._scratch.get(size)) is None:
            needed = self._scratch[size] = kernels().kt_linear_scratch(self._reference, *size)
        kernels().kt_linear_forward(
            self._reference,
            rows.data_ptr(),
            DTYPES[x.dtype],
            tokens,
            out.data_ptr(),
            scratch(needed),
            threads,
        )
        if active.recorder is not None:
            active.recorder.note("linear", self, (rows,), out)
        return out

    def __reduce__(self) -> Any:
        """Copies and pickles of what keeps a call get None: the addresses in it are of this object's tensors."""
        return type(None), ()
