"""Vision towers cut pictures into patches with a Conv3d whose windows lie side by side, which is one matrix product.

PyTorch 2.9's Conv3d is slow in bfloat16 on GPUs (pytorch#166122), so LLaMA-Factory refuses models that have one. Here such layers
compute the product; a Conv3d whose windows overlap, skip or are padded stays what it is.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PatchProduct(nn.Module):
    """Stands in as the class of an ``nn.Conv3d`` that cuts patches, and has its parameters and attributes."""

    weight: nn.Parameter
    """[out, in, t, h, w]"""
    bias: nn.Parameter | None
    kernel_size: tuple[int, int, int]

    def forward(self, input: Tensor) -> Tensor:
        """[N, in, T, H, W] -> [N, out, T / t, H / h, W / w]."""
        windows = input
        for axis, size in enumerate(self.kernel_size, start=2):
            windows = windows.unfold(axis, size, size)  # after the last: [N, in, T / t, H / h, W / w, t, h, w]
        rows = windows.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)
        return F.linear(rows, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


def cut_patches_by_products(model: nn.Module) -> None:
    """Have every Conv3d that only cuts into patches compute a product."""
    for module in model.modules():
        if type(module) is nn.Conv3d and _only_cuts(module):
            module.__class__ = PatchProduct  # type: ignore[assignment]  # PEFT and hooks hold the object


def cut_patches_by_convolutions(model: nn.Module) -> None:
    """Take :func:`cut_patches_by_products` back: PEFT wraps layers of PyTorch's own classes alone."""
    for module in model.modules():
        if type(module) is PatchProduct:
            module.__class__ = nn.Conv3d  # type: ignore[assignment]


def _only_cuts(layer: nn.Conv3d) -> bool:
    plain = layer.dilation == (1, 1, 1) and layer.padding in ((0, 0, 0), "valid") and layer.groups == 1
    return plain and layer.kernel_size == layer.stride
