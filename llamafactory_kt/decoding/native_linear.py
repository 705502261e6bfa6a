"""Linear layers on the native kernels. Their weights stay ordinary parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..native.fused_linear import Factors, FusedLinear, fits


class NativeLinear(nn.Linear):
    """Stands in as the class of an ``nn.Linear``. Whatever the kernels do not read (another device, gradients) PyTorch computes, and what a
    graph is made of."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the dtype of the input."""
        fused = fused_linear(self, self, input) if not torch.compiler.is_compiling() else None
        return fused(input) if fused is not None else super().forward(input)


def fused_linear(
    layer: nn.Linear, owner: nn.Module, x: torch.Tensor, key: Any = None, factors: Callable[[], list[Factors]] = list
) -> FusedLinear | None:
    """The call that computes a layer, kept by its owner for as long as it is of the layer's weights; None if the kernels cannot, or PyTorch
    has to say what is wrong with the input.

    Args:
        key: tells the owner's calls apart.
        factors: of the LoRA on top.
    """
    weight, kept = layer.weight, vars(owner).setdefault("_kt_fused", {})
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if gradients or not FusedLinear.takes(x) or x.shape[-1] != layer.in_features:
        return None
    found: FusedLinear | None = kept.get(key)
    if found is None or not found.is_of(weight):
        found = kept[key] = FusedLinear(weight, layer.bias, factors()) if fits(weight) else None
    return found


def forget_fused(module: nn.Module) -> None:
    """Before weights change in dtype or place."""
    vars(module).pop("_kt_fused", None)
