"""bfloat16 weights in columns, for CPUs on which oneDNN has no bfloat16 kernels (without AVX-512).

Torch's own product with one row goes along each row of a weight in turn. FBGEMM's embedding kernels, which torch brings
(``torch.embedding_bag``: the sum of some rows of a table, each times its own factor, in float32), fetch memory ahead and
took up to a quarter less time. So a weight [out, in] is kept as a table of ``in`` rows for each :data:`WIDTH` outputs, and a product is
the sum of a table's rows times the numbers of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

WIDTH = 64
"""outputs side by side: two lines of the CPU's cache; with more, FBGEMM runs out of registers, with fewer, reading its
row numbers and factors shows"""
BLOCK = 2**20
"""numbers of a weight that are transposed, or converted to float32, at a time: they stay in the cache"""
ROWS_AT_ONCE = 2**22
"""of tables in one call: their numbers, of four bytes each, are kept"""
MANY_ROWS = 512
"""of x, for which one wide product is faster than one for each table"""

_APART = 64
"""numbers between the rows of what is transposed; rows at powers of two would all want the same place in the cache"""


def layout(size: tuple[int, int]) -> tuple[int, int, int]:
    """Of a weight (out, in): [out / WIDTH, in, WIDTH]."""
    return size[0] // WIDTH, size[1], WIDTH


def store(columns: torch.Tensor, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Write a weight, its rows in one tensor or several, [..., in] each, into columns [out / WIDTH, in, WIDTH]."""
    columns.zero_()  # new memory is had twice as fast from end to end as by threads that write across it
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


def linear(x: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None, wide: bool) -> torch.Tensor:
    """[..., in] -> [..., out], of the dtype of x, computed in float32 (wide) or in bfloat16 with sums in float32."""
    rows = x.reshape(-1, x.shape[-1])
    found = more_rows(rows.float(), columns) if wide else few_rows(rows.to(torch.bfloat16), columns)
    if bias is not None:
        found.add_(bias)
    return found.to(x.dtype).view(*x.shape[:-1], found.shape[-1])


def few_rows(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """x [n, in] in bfloat16 -> [n, out] in bfloat16, summed in float32. The weight is read once, and the numbers of its rows
    n times."""
    (rows, width), tables = x.shape, len(columns)
    at_once = max(1, ROWS_AT_ONCE // (width * max(1, rows)))
    if tables > at_once:
        return torch.cat([few_rows(x, part) for part in columns.split(at_once)], dim=1)
    numbers, offsets = _numbers(tables, width, rows)
    factors = x.expand(tables, rows, width).reshape(-1)
    found = torch.embedding_bag(columns.view(-1, WIDTH), numbers, offsets, False, 0, False, factors)[0]
    if rows == 1:
        return found.view(1, -1)
    return found.view(tables, rows, WIDTH).transpose(0, 1).reshape(rows, tables * WIDTH)


def more_rows(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """x [n, in] in float32 -> [n, out] in float32, with some tables at a time converted to float32."""
    tables, width, _ = columns.shape
    at_once = min(tables, max(torch.get_num_threads(), BLOCK // (width * WIDTH)))
    out = x.new_empty(len(x), tables, WIDTH)
    memory = x.new_empty(at_once * width * WIDTH)
    for start in range(0, tables, at_once):
        part = columns[start : start + at_once]
        wide = memory[: part.numel()]
        if len(x) < MANY_ROWS:
            found = x.expand(len(part), -1, -1).bmm(wide.view_as(part).copy_(part)).transpose(0, 1)
        else:
            side_by_side = wide.view(width, len(part), WIDTH).copy_(part.transpose(0, 1))
            found = x.mm(side_by_side.flatten(1)).unflatten(1, (-1, WIDTH))
        out[:, start : start + len(part)] = found
    return out.flatten(1)


_counted = torch.empty(0, dtype=torch.int32)


def _numbers(tables: int, width: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of the tables are in each sum, [tables * rows * width], and where those of a sum begin, [tables * rows]."""
    numbers, offsets = _kept_numbers(tables, width)
    if rows == 1:
        return numbers, offsets
    numbers = numbers.view(tables, 1, width).expand(-1, rows, -1).reshape(-1)
    return numbers, torch.arange(0, len(numbers), width, dtype=torch.int32)


@lru_cache(256)
def _kept_numbers(tables: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For one row. All of them share their memory."""
    global _counted
    if len(_counted) < tables * width:
        _counted = torch.arange(tables * width, dtype=torch.int32)
        _kept_numbers.cache_clear()
    return _counted[: tables * width], torch.arange(0, tables * width, width, dtype=torch.int32)
