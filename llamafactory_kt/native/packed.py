"""Weights of four or eight bits, as the native kernels read them: codes, and for each group of a row a scale, and perhaps an offset."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from ctypes import pointer
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from .library import DTYPES, PANEL, PackingCall, QuantizationCall, Weight, byref, kernels

GROUP = 32
"""values that share a scale where this package quantizes"""
ALL = 2**62
"""as :attr:`Packing.group`: all values of a row; as :attr:`Packing.rows_of_scale`: all rows"""
KINDS = {"int4": 6, "int8": 7, "e4m3": 8}
"""``kt_dtype`` of the codes"""
SYMMETRIC = tuple(float(code - 8) for code in range(16))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""the numbers of MXFP4 (OCP Microscaling Formats 1.0)"""


@dataclass(frozen=True)
class Packing:
    """How codes stand for weights: the value of a code times the scale of its group, plus the group's offset where there are some."""

    kind: str
    """``int4``: the value is that of :attr:`table`, and the lower half of a byte comes first; ``int8``; ``e4m3``: float8_e4m3fn"""
    group: int = GROUP
    """values of a row that share a scale: a power of two from 32 (``e4m3``: 64) on, or all of them"""
    rows_of_scale: int = 1
    """rows that share their scales"""
    scale_dtype: torch.dtype = torch.bfloat16
    """or float32"""
    table: Sequence[float] = SYMMETRIC
    """of ``int4``, exact in bfloat16"""
    has_offsets: bool = False

    @property
    def bits(self) -> int:
        return 4 if self.kind == "int4" else 8

    @cached_property
    def call(self) -> PackingCall:
        """``kt_packing``."""
        return PackingCall(self.group, self.rows_of_scale, DTYPES[self.scale_dtype], tuple(self.table))

    @property
    def rows_together(self) -> int:
        """Rows that cannot be split: they share a scale, or a panel of offsets."""
        return math.lcm(1 if self.rows_of_scale == ALL else self.rows_of_scale, PANEL if self.has_offsets else 1)

    def fits(self, cols: int) -> bool:
        """Whether the kernels take rows of so many values."""
        smallest, whole = 64 if self.kind == "e4m3" else 32, cols * self.bits % 8 == 0
        return whole and (self.group >= cols or (self.group >= smallest and self.group.bit_count() == 1))

    def sizes(self, rows: int, cols: int) -> tuple[int, int]:
        """Of a weight: bytes of codes, and how many scales."""
        return rows * cols * self.bits // 8, -(-rows // self.rows_of_scale) * -(-cols // self.group)

    def nbytes(self, rows: int, cols: int) -> int:
        """Memory of a weight."""
        codes, scales = self.sizes(rows, cols)
        offsets = -(-rows // PANEL) * PANEL * -(-cols // self.group) if self.has_offsets else 0
        return codes + scales * self.scale_dtype.itemsize + 4 * offsets


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in].

    Args:
        codes: uint8 [out, in * bits / 8]; rows may be apart.
        scales: [out / rows_of_scale, in / group], rounded up; rows may be apart.
        offsets: float32 [out, in / group] in panels (:func:`in_panels`).
    """

    packing: Packing
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, width = self.codes.shape
        return rows, width * 8 // self.packing.bits

    @property
    def tensors(self) -> list[torch.Tensor]:
        """In the order of :meth:`map`."""
        return [self.codes, self.scales, *([] if self.offsets is None else [self.offsets])]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def __getitem__(self, rows: slice) -> PackedWeight:
        """Some rows, without a copy. Where :attr:`Packing.rows_together` is more than one, they begin with the first of so many."""
        scales, shared, offsets = self.scales, self.packing.rows_of_scale, self.offsets
        start, stop, step = rows.indices(len(self.codes))
        assert self.packing.rows_together == 1 or (start % self.packing.rows_together == 0 and step == 1)
        if shared == 1:
            scales = scales[rows]
        elif shared < ALL:
            scales = scales[start // shared : -(-stop // shared)]
        if offsets is not None:
            offsets = offsets[start // PANEL : -(-stop // PANEL)]
        return replace(self, codes=self.codes[rows], scales=scales, offsets=offsets)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PackedWeight:
        """The weight with what the function returns for each of its tensors."""
        return PackedWeight(self.packing, *map(function, self.tensors))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[out, in], multiplied in float32 and rounded once."""
        packing, (rows, cols) = self.packing, self.shape
        if packing.kind == "int4":
            codes = torch.stack([self.codes & 15, self.codes >> 4], -1).view(rows, cols)
            values = torch.tensor(packing.table, device=codes.device)[codes.int()]
        else:
            values = self.codes.view(torch.int8 if packing.kind == "int8" else torch.float8_e4m3fn).float()
        scales = self.scales.float().repeat_interleave(min(packing.rows_of_scale, rows), 0)[:rows]
        values = values * scales.repeat_interleave(min(packing.group, cols), 1)[:, :cols]
        if self.offsets is not None:
            offsets = self.offsets.transpose(1, 2).flatten(0, 1)[:rows]
            values += offsets.repeat_interleave(min(packing.group, cols), 1)[:, :cols]
        return values.to(dtype)


Matrix = torch.Tensor | PackedWeight


class PackedExpert(NamedTuple):
    """One expert's weights: gate and up [I, H], down [H, I]. Without a gate, gate is [0, H]."""

    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight


def call_of(weight: torch.Tensor | PackedWeight) -> tuple[int, Any, Weight]:
    """How the kernels find a weight [out, in] each of whose rows is contiguous: ``kt_dtype``, ``kt_packing`` (None for floats), and a ``kt_weight``
    without LoRA and bias."""
    packed = getattr(weight, "packed", weight)
    if isinstance(packed, PackedWeight):
        own = Weight(packed.codes.data_ptr(), packed.codes.stride(0) * 8 // packed.packing.bits)
        own.scales, own.scale_stride = packed.scales.data_ptr(), packed.scales.stride(0)
        own.offsets = packed.offsets.data_ptr() if packed.offsets is not None else None
        return KINDS[packed.packing.kind], pointer(packed.packing.call), own
    return DTYPES[packed.dtype], None, Weight(packed.data_ptr(), packed.stride(0))


def quantize(weight: torch.Tensor, bits: int, codes: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
    """Symmetric codes with a scale for each :data:`GROUP` values of a row; of four bits, fitted to the codes by least squares.

    Args:
        weight: [out, in] on the CPU, float32, bfloat16 or float16; of an even width for four bits.
        bits: 4 or 8.
        codes: to write to: uint8, contiguous, of the size that :meth:`Packing.sizes` says; and scales, bfloat16.

    Raises:
        ValueError: A weight is not finite.
    """
    rows, cols = weight.shape
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    packing = Packing(f"int{bits}")
    assert (codes.numel(), scales.numel()) == packing.sizes(rows, cols)
    call = QuantizationCall(
        rows, cols, weight.data_ptr(), weight.stride(0), DTYPES[weight.dtype], bits, codes.data_ptr(), scales.data_ptr()
    )
    if kernels().kt_quantize(byref(call), torch.get_num_threads()):
        raise ValueError("values that are not finite")
    return PackedWeight(packing, codes.view(rows, -1), scales.view(rows, -1))
