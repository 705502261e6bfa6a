"""The native engine on integers: weights are quantized while they are read. LoRA is added as to any others, in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ...adapters import ExpertsShape
from ...ground.errors import KTModelError
from ...ground.paging import empty_in_huge_pages
from ...native.packed import PackedExpert, Packing, quantize
from ..base import EngineOptions, LayerMemory
from ..bounds import Bounds
from .engine import NativeEngine


class IntegerEngine(NativeEngine):
    """Symmetric integers with a bfloat16 scale for each 32 values of a row."""

    maps_weights = takes_packed = False
    bits: ClassVar[int]

    @classmethod
    def auto(cls, merged: bool) -> bool:
        return False  # it loses precision, which must be wanted

    @classmethod
    def memory(cls, shape: ExpertsShape, rank: int, itemsize: float, options: EngineOptions) -> LayerMemory:
        sizes = (shape.projection(projection) for projection in shape.projections)
        weights = shape.num_experts * sum(cls._packing().nbytes(*size) for size in sizes)
        read = int(shape.num_weights // shape.num_experts * itemsize)
        return LayerMemory(weights, super().memory(shape, rank, itemsize, options).lora, read)

    @classmethod
    def _packing(cls) -> Packing:
        return Packing(f"int{cls.bits}")

    def read_weights(self) -> Sequence[PackedExpert]:
        """Expert after expert in one block, as a token reads them."""
        shape, packing = self.spec.shape, self._packing()
        sizes = [packing.sizes(*shape.projection(name)) for name in ("gate", "up", "down")]
        codes_of, scales_of = zip(*sizes, strict=True)
        codes = empty_in_huge_pages((shape.num_experts, sum(codes_of)), torch.uint8)
        scales = empty_in_huge_pages((shape.num_experts, sum(scales_of)), packing.scale_dtype)
        found = []
        for number, expert in enumerate(self.read_experts(None)):
            places = zip(expert, codes[number].split(codes_of), scales[number].split(scales_of), strict=True)
            try:
                found.append(PackedExpert(*(quantize(matrix, self.bits, *to) for matrix, *to in places)))
            except ValueError as error:
                raise KTModelError(
                    f"Expert {number} of layer {self.spec.layer} has {error}. Download or copy the checkpoint again."
                ) from error
        return found


class Int8Engine(IntegerEngine):
    """Eight bits: half of the memory."""

    name = "INT8"
    bits = 8
    bounds = Bounds(relative=0.04)  # 0.01 of a layer's norm, and bfloat16's


class Int4Engine(IntegerEngine):
    """Four bits: 0.28 of the memory."""

    name = "INT4"
    bits = 4
    bounds = Bounds(relative=0.25, strength=0.1)  # 0.14 of a layer's norm


__all__ = ["Int4Engine", "Int8Engine"]
