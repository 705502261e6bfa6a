"""Weights of integers in one block of memory or of a file: of each weight its codes and then its scales, in the order in which a token reads
them, each from a multiple of :data:`ALIGNMENT` bytes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .packed import PackedWeight, Packing, quantize

ALIGNMENT = 64
"""bytes, of a line of the CPU's caches"""

Shapes = Sequence[tuple[int, int]]
"""[out, in] of each weight"""


def aligned(nbytes: int) -> int:
    """The next multiple of :data:`ALIGNMENT`.

    >>> aligned(1), aligned(64)
    (64, 64)
    """
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def block_nbytes(packing: Packing, shapes: Shapes) -> int:
    """Of a block for such weights."""
    return sum(_sizes(packing, shapes))


def _sizes(packing: Packing, shapes: Shapes) -> list[int]:
    parts = (packing.sizes(*shape) for shape in shapes)
    return [aligned(size) for codes, scales in parts for size in (codes, scales * packing.scale_dtype.itemsize)]


def weights_in(block: torch.Tensor, packing: Packing, shapes: Shapes) -> list[PackedWeight]:
    """The weights of a block, as views.

    Args:
        block: uint8 [:func:`block_nbytes`], contiguous.
        packing: without offsets.
    """
    parts = iter(block.split(_sizes(packing, shapes)))
    found = []
    for rows, cols in shapes:
        codes, scales = packing.sizes(rows, cols)
        own = next(parts)[:codes], next(parts)[: scales * packing.scale_dtype.itemsize].view(packing.scale_dtype)
        widths = packing.sizes(1, cols)
        found.append(PackedWeight(packing, *(part.view(rows, width) for part, width in zip(own, widths, strict=True))))
    return found


def quantize_into(block: torch.Tensor, packing: Packing, weights: Sequence[torch.Tensor]) -> list[PackedWeight]:
    """Quantize weights, and return what :func:`weights_in` does.

    Args:
        block: to write to.
        packing: as :func:`quantize` has it.
        weights: as :func:`quantize` takes them.

    Raises:
        ValueError: A weight is not finite.
    """
    found = weights_in(block, packing, [(len(weight), weight.shape[1]) for weight in weights])
    for weight, packed in zip(weights, found, strict=True):
        if len(weight):
            quantize(weight, packing.bits, packed.codes, packed.scales)
    return found
