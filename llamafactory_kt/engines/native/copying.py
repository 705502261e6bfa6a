"""Copies of weights, expert after expert in one block of huge pages, as a token reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

from ...ground.paging import empty_in_huge_pages
from ...native.packed import Matrix, PackedWeight
from ...native.packed_block import aligned


class Experts(Protocol):
    """One expert's weights, as :class:`ExpertWeights` has them."""

    @property
    def gate(self) -> Matrix: ...
    @property
    def up(self) -> Matrix: ...
    @property
    def down(self) -> Matrix: ...


def copied(experts: Iterable[Experts], count: int) -> Iterator[Experts]:
    """Each expert's copy, before the next one is asked for.

    Args:
        experts: ``count`` tuples of the same sizes and dtypes.
    """
    block: torch.Tensor | None = None
    for number, expert in enumerate(experts):
        matrices = expert.gate, expert.up, expert.down
        sizes = [aligned(tensor.nbytes) for matrix in matrices for tensor in _tensors(matrix)]
        if block is None:
            block = empty_in_huge_pages((count, sum(sizes)), torch.uint8)
        places = iter(block[number].split(sizes))
        kind: Any = type(expert)
        yield kind(*(_copied(matrix, places) for matrix in matrices))


def _tensors(matrix: Matrix) -> list[torch.Tensor]:
    return matrix.tensors if isinstance(matrix, PackedWeight) else [matrix]


def _copied(matrix: Matrix, places: Iterator[torch.Tensor]) -> Matrix:
    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return next(places)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    return matrix.map(copy) if isinstance(matrix, PackedWeight) else copy(matrix)
