"""MXFP4, as gpt-oss is published: four-bit floats (E2M1) with a power of two for each 32 (OCP Microscaling Formats 1.0).

A fused weight of all experts, [E, in, out] in the unquantized model, is stored as ``gate_up_proj_blocks`` uint8
[E, out, in / 32, 16], the first of a byte's two numbers in its lower half, and ``gate_up_proj_scales`` uint8 [E, out, in / 32],
exponents plus 127.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ...native.packed import E2M1, PackedWeight, Packing
from ..stored import StoredTensor
from .format import Format, Shape, Wanted, scaled
from .packing import unpack
from .values import Values

GROUP = 32
"""numbers that share an exponent"""
BIAS = 127


class Mxfp4(Format):
    """``quant_method: mxfp4``."""

    title = "MXFP4"
    parts: ClassVar[Mapping[str, str]] = {"blocks": "_blocks", "scales": "_scales"}
    in_place: ClassVar[Sequence[str]] = ("blocks",)
    turned = True

    @classmethod
    def from_config(cls, values: Values) -> Format | None:
        return cls() if values.text("quant_method") == "mxfp4" else None

    def wanted(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Mapping[str, Wanted]:
        *experts, width, out = shape
        groups = -(-width // GROUP)  # a width that is no multiple of 32 fits no blocks, and is found so
        return {
            "blocks": Wanted([(*experts, out, groups, GROUP // 2)] if width % GROUP == 0 else [], ["U8"]),
            "scales": Wanted([(*experts, out, groups)], ["U8"]),
        }

    def decode(
        self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        width, out = shape
        return super().decode(parts, (out, width), dtype).T

    def rows(self, parts: Mapping[str, torch.Tensor], rows: slice, shape: Shape) -> torch.Tensor:
        values = e2m1(unpack(parts["blocks"][rows].flatten(-2), 4))
        return scaled(values, torch.ldexp(torch.ones_like(values[0, 0]), parts["scales"][rows].to(torch.int32) - BIAS))

    def packing(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Packing | None:
        return Packing("int4", GROUP, table=E2M1)

    def packed(self, parts: Mapping[str, torch.Tensor], packing: Packing, shape: Shape) -> PackedWeight:
        return PackedWeight(packing, parts["blocks"].flatten(-2), powers_of_two(parts["scales"]))


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """uint8 exponents plus 127 -> bfloat16, which has them in the same bits; but 2^-127, and the last, which is no number."""
    return exponents.to(torch.int16).bitwise_left_shift_(7).masked_fill_(exponents == 0, 1 << 6).view(torch.bfloat16)


def e2m1(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes of four bits, a sign, two of the exponent and one of the mantissa -> float32. A float16 has room for these bits,
    with another exponent bias."""
    wide = codes.to(torch.int16)
    signs = (wide & 8).bitwise_left_shift_(12)
    halves = wide.bitwise_and_(7).bitwise_left_shift_(9).bitwise_or_(signs).view(torch.float16)
    return halves.to(torch.float32).mul_(2.0 ** (15 - 1))
