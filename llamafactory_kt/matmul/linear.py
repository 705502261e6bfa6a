"""Linear layers with bfloat16 weights on the CPU, plain or packed (:mod:`.layouts`).

Without AVX-512, oneDNN has no bfloat16 kernels, and PyTorch's own are fast for a few rows only, where memory bandwidth is the limit. More
rows are multiplied in float32, one block of the weight at a time, which stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import column_tiles as columns
from .mkldnn_ops import has_bfloat16_kernels, onednn_linear
from .packed_weight import for_kernels

FEW_ROWS = 8
"""with fewer, bfloat16 is faster even without oneDNN's kernels"""
BLOCK = 2**20
"""values of a weight that are converted to float32 at a time"""


def computed_in(rows: int) -> torch.dtype:
    """The dtype that a product with this many rows is computed in. Where it is float32, float32 inputs and outputs need no conversion,
    and keep what bfloat16 would round off."""
    return torch.bfloat16 if has_bfloat16_kernels() or rows < FEW_ROWS else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], bfloat16 or float32 -> [..., out] in the dtype of x; the weight is bfloat16, plain or packed."""
    wide = computed_in(x.numel() // x.shape[-1]) == torch.float32
    return product(x, for_kernels(weight), bias, wide, numbers(weight), torch.get_num_threads())


def numbers(weight: Tensor) -> Tensor:
    """The row numbers that :func:`product` takes for this weight."""
    return columns.counted(weight) if weight.dim() == 3 else columns.NONE


def product(x: Tensor, weight: Tensor, bias: Tensor | None, wide: bool, numbers: Tensor, threads: int) -> Tensor:
    """:func:`linear`, in what TorchScript can compile.

    Args:
        weight: as :func:`~.packed_weight.for_kernels` gives it.
        wide: compute in float32.
        numbers: as :func:`numbers` gives them for the weight.
        threads: number of threads that compute.
    """
    if weight.dim() == 3:
        return columns.linear(x, weight, bias, wide, numbers, threads)
    if wide:
        return _in_blocks(x, weight, bias)
    rows = x.to(torch.bfloat16)
    found = onednn_linear(rows, weight, bias) if weight.is_mkldnn else F.linear(rows, weight, bias)
    return found.to(x.dtype)


class PreparedLinear(nn.Linear):
    """A linear layer for inference. Its weight may be packed, for :func:`linear` to read."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], bfloat16; or float32 where it is computed in that."""
        if input.dtype != torch.bfloat16 and input.dtype != computed_in(input.numel() // input.shape[-1]):
            raise RuntimeError(f"expected bfloat16, got {input.dtype}")
        return linear(input, self.weight, self.bias)


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, block: int = BLOCK) -> Tensor:
    rows, size, width = x.float(), weight.shape[0], weight.shape[1]
    at_once = max(1, block // width)
    out, wide = rows.new_empty(x.shape[:-1] + weight.shape[:1]), rows.new_empty([at_once, width])
    for start in range(0, size, at_once):
        part = weight[start : start + at_once]
        own = None if bias is None else bias[start : start + at_once].float()
        out[..., start : start + at_once] = onednn_linear(rows, wide[: part.shape[0]].copy_(part), own)
    return out.to(x.dtype)
