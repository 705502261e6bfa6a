"""Integers of 4 and 8 bits, packed into words of 32 with the first one in the lowest bits."""

from __future__ import annotations

import torch

WORD = 32
"""bits of a packed word"""


def packed_width(count: int, bits: int) -> int:
    """How many words hold ``count`` integers.

    >>> packed_width(12, 4)
    2
    """
    return -(-count * bits // WORD)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 or uint8 [rows, words] -> uint8 [rows, integers], in the order of their bits.

    >>> unpack(torch.tensor([[0x21]], dtype=torch.int32), 4)
    tensor([[1, 2, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)
    """
    # A copy, as a tensor of one column may count as contiguous whatever its stride. x86 and ARM are little-endian.
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return octets
    wide = octets.to(torch.int16)
    return wide.bitwise_left_shift(4).bitwise_or_(wide).bitwise_and_(0x0F0F).view(torch.uint8)


def halves(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, n], of four bits -> uint8 [rows, n / 2], the first of two in a byte's lower half.

    >>> halves(torch.tensor([[1, 2]], dtype=torch.uint8))
    tensor([[33]], dtype=torch.uint8)
    """
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpacked_rows(words: torch.Tensor, bits: int, rows: slice) -> torch.Tensor:
    """Some rows of integers that are packed downwards: int32 [words, columns] -> uint8 [rows, columns].

    Args:
        rows: start and end are given; no word holds rows before the start.
    """
    some = words[rows.start * bits // WORD : packed_width(rows.stop, bits)]
    return unpack(some.T, bits)[:, : rows.stop - rows.start].T
