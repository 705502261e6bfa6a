"""PyTorch's oneDNN operators, which it keeps to itself (``torch.ops.mkldnn``): its compiler calls them, and no public function does."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..ground.internals import TESTED, Internal

INTERNAL = Internal("mkldnn-ops", "torch", TESTED["torch"])


@cache
def onednn_problem() -> str | None:
    """Why oneDNN computes nothing here, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    return None if INTERNAL.usable else f"its operators are switched off, or torch is not {INTERNAL.versions}"


@cache
def has_bfloat16_kernels() -> bool:
    """Whether oneDNN has bfloat16 kernels for this CPU; they need AVX-512."""
    try:
        return onednn_problem() is None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times a weight [out, in] of its dtype, plain or from :func:`pack` -> [..., out]. TorchScript compiles it."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def pack(weight: Tensor) -> Tensor:
    """A bfloat16 weight [out, in] in oneDNN's layout; Python cannot read its values."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return packed
