"""Shapes and strides as the kernels' steps take them."""

from __future__ import annotations

from collections.abc import Sequence

from .places import CannotLower


def collapsed(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Four sizes, and each operand's strides: neighboring dimensions are one where all operands allow it.

    Raises:
        CannotLower: More than four are left.
    """
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(own[-1] == size * every[dim] for own, every in zip(kept, strides, strict=True)):
            sizes[-1] *= size
            for own, every in zip(kept, strides, strict=True):
                own[-1] = every[dim]
            continue
        sizes.append(size)
        for own, every in zip(kept, strides, strict=True):
            own.append(every[dim])
    if len(sizes) > 4:
        raise CannotLower("more than four dimensions")
    missing = 4 - len(sizes)
    return [1] * missing + sizes, [[0] * missing + own for own in kept]
