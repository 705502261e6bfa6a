"""Products with bfloat16 weights on the CPU, plain or packed ones (:mod:`.packing`).

Without AVX-512, oneDNN has no bfloat16 kernels, and torch's own are fast for a few rows only, where reading the weights is
what they cost. There, more rows are multiplied in float32, with a block of the weights at a time, which stays in the cache.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import column_tiles as columns

FEW_ROWS = 8
"""with fewer, bfloat16 is faster without its kernels too"""
BLOCK = 2**20
"""numbers of a weight that are converted to float32 at a time"""


def onednn_problem() -> str | None:
    """Why oneDNN computes nothing here, or None."""
    return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"


@cache
def has_bfloat16_kernels() -> bool:
    """Whether oneDNN has them for this CPU; they need AVX-512."""
    try:
        return onednn_problem() is None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def computed_in(rows: int) -> torch.dtype:
    """What a product with so many rows is computed in. Where it is float32, rows that are float32 already, and results that
    are to be, need no conversion, and keep what bfloat16 would round off."""
    return torch.bfloat16 if has_bfloat16_kernels() or rows < FEW_ROWS else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] -> [..., out], of the dtype of x, which is bfloat16 or float32, for a weight in bfloat16, plain or packed."""
    wide = computed_in(x.numel() // x.shape[-1]) == torch.float32
    return product(x, weight, bias, wide, numbers(weight), torch.get_num_threads())


def numbers(weight: Tensor) -> Tensor:
    """What :func:`product` wants for this weight."""
    return columns.counted(weight) if weight.dim() == 3 else columns.NONE


def product(x: Tensor, weight: Tensor, bias: Tensor | None, wide: bool, numbers: Tensor, threads: int) -> Tensor:
    """:func:`linear` in terms that TorchScript knows.

    Args:
        wide: compute in float32.
        threads: that compute.
    """
    if weight.dim() == 3:
        return columns.linear(x, weight, bias, wide, numbers, threads)
    if wide:
        return _in_blocks(x, weight, bias)
    rows = x.to(torch.bfloat16)
    found = _onednn(rows, weight, bias) if weight.is_mkldnn else F.linear(rows, weight, bias)
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
        out[..., start : start + at_once] = _onednn(rows, wide[: part.shape[0]].copy_(part), own)
    return out.to(x.dtype)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
