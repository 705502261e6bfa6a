"""Experts as PyTorch's own bfloat16 products, which oneDNN computes."""

from __future__ import annotations

import torch

from .native import NativeEngine
from .reference import ReferenceEngine


class OneDNNEngine(ReferenceEngine):
    """bfloat16 weights and activations, float32 sums inside each product; LoRA in float32.

    For machines on which the native kernels do not run.
    """

    name = "oneDNN"
    bits = 16
    weights_dtype = multiplied = torch.bfloat16
    fallback = False

    @classmethod
    def problem(cls) -> str | None:
        return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"

    @classmethod
    def auto(cls, merged: bool) -> bool:
        return NativeEngine.problem() is not None
