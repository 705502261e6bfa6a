"""bfloat16 weights in column tiles, for CPUs on which oneDNN has no bfloat16 kernels (without AVX-512).

A weight [out, in] is kept as one table of ``in`` rows for each :data:`WIDTH` outputs. A matrix-vector product is then a weighted sum of
table rows, which is what FBGEMM's embedding kernels compute (``torch.embedding_bag``, with float32 sums). They prefetch, which
PyTorch's own bfloat16 kernel, going along one row after the other, does not.

TorchScript compiles these functions too (``engines/onednn/script.py``). It sees globals only as default values of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WIDTH = 64
"""outputs in a tile: two cache lines. With more, FBGEMM runs out of registers; with fewer, reading row numbers and factors shows"""
BLOCK = 2**20
"""values of a weight that are transposed, or converted to float32, at a time: they stay in the cache"""
ROWS_AT_ONCE = 2**22
"""table rows in one call; their numbers, of four bytes each, are kept"""
MANY_ROWS = 512
"""rows of x from which one wide product is faster than one for each table"""

_APART = 64
"""padding between the rows of what is transposed; at powers of two, all rows would map to the same cache sets"""


def layout(size: tuple[int, int]) -> tuple[int, int, int]:
    """Shape of the tiles of a weight (out, in): [out / WIDTH, in, WIDTH]."""
    return size[0] // WIDTH, size[1], WIDTH


def store(columns: torch.Tensor, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Write a weight, its rows in one tensor or several, [..., in] each, into columns [out / WIDTH, in, WIDTH]."""
    columns.zero_()  # page faults are cheaper in memory order than from threads that write across it
    width, written = columns.shape[1], 0
    lines = max(1, BLOCK // (width * WIDTH)) * WIDTH
    apart = columns.new_empty(lines, width + _APART)[:, :width]
    for source in rows if all(len(part) % WIDTH == 0 for part in rows) else [torch.cat(tuple(rows))]:
        for given in source.split(lines):
            block = apart[: len(given)].copy_(given).unflatten(0, (-1, WIDTH))
            columns[written : written + len(block)].copy_(block.transpose(1, 2))
            written += len(block)
    return columns


def restore(columns: torch.Tensor) -> torch.Tensor:
    """The weight [out, in], as it was stored."""
    return columns.transpose(1, 2).flatten(0, 1)


def linear(x: Tensor, columns: Tensor, bias: Tensor | None, wide: bool, numbers: Tensor, threads: int) -> Tensor:
    """[..., in] -> [..., out], of the dtype of x, computed in float32 (wide) or in bfloat16 with sums in float32.

    Args:
        numbers: as :func:`counted` has them for these columns.
        threads: that compute.
    """
    rows = x.reshape(-1, x.shape[-1])
    found = more_rows(rows.float(), columns, threads) if wide else few_rows(rows.to(torch.bfloat16), columns, numbers)
    if bias is not None:
        found.add_(bias)
    return found.to(x.dtype).view(x.shape[:-1] + found.shape[-1:])


def few_rows(x: Tensor, columns: Tensor, numbers: Tensor, at_once: int = ROWS_AT_ONCE) -> Tensor:
    """x [n, in] in bfloat16 -> [n, out] in bfloat16, summed in float32. The weight is read once, and the numbers of its rows
    n times."""
    rows, width = x.shape
    found: list[Tensor] = []
    for part in columns.split(max(1, at_once // (width * max(1, rows)))):
        tables, side = part.shape[0], part.shape[2]
        summed = numbers[: tables * width]
        if rows != 1:
            summed = summed.view(tables, 1, width).expand(-1, rows, -1).reshape(-1)
        starts = torch.arange(0, summed.shape[0], width, dtype=torch.int32, device=x.device)
        factors = x.expand(tables, rows, width).reshape(-1)
        sums = torch.embedding_bag(part.flatten(0, 1), summed, starts, False, 0, False, factors)[0]
        found.append(sums.view(tables, rows, side).transpose(0, 1).reshape(rows, tables * side))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def more_rows(x: Tensor, columns: Tensor, threads: int, block: int = BLOCK, many: int = MANY_ROWS) -> Tensor:
    """x [n, in] in float32 -> [n, out] in float32, with some tables at a time converted to float32."""
    tables, width, side = columns.shape
    at_once = min(tables, max(threads, block // (width * side)))
    out = x.new_empty([x.shape[0], tables, side])
    memory = x.new_empty([at_once * width * side])
    for start in range(0, tables, at_once):
        part = columns[start : start + at_once]
        wide = memory[: part.numel()]
        if x.shape[0] < many:
            found = x.expand(part.shape[0], -1, -1).bmm(wide.view_as(part).copy_(part)).transpose(0, 1)
        else:
            side_by_side = wide.view(width, part.shape[0], side).copy_(part.transpose(0, 1))
            found = x.mm(side_by_side.flatten(1)).view(-1, part.shape[0], side)
        out[:, start : start + at_once] = found
    return out.flatten(1)


NONE = torch.empty(0, dtype=torch.int32)
"""for weights that are not in column tiles"""
_counted = NONE


def counted(columns: Tensor) -> Tensor:
    """The numbers of all rows of a weight's tables, and perhaps more; all weights share the memory."""
    global _counted
    if len(_counted) < len(columns) * columns.shape[1]:
        _counted = torch.arange(len(columns) * columns.shape[1], dtype=torch.int32)
    return _counted
