"""The native engine on integers: weights are quantized while they are read, or were before (``kt_weight_path``). LoRA is added as to any
others, in full precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch

from ...adapters import ExpertsShape
from ...checkpoint.expert_weights import ExpertWeights
from ...ground.errors import KTModelError
from ...ground.paging import drop_pages, empty_in_huge_pages, prefetch_pages
from ...native.packed import PackedExpert, Packing
from ...native.packed_block import quantize_into
from ..bounds import Bounds
from ..options import DEFAULT_OPTIONS, EngineOptions, EngineSpec, LayerMemory, ReadExperts
from .copying import Experts
from .engine import NativeEngine
from .integer_files import EXPERTS, ExpertsRecord, experts_in, layer_size, open_experts


class IntegerEngine(NativeEngine):
    """Symmetric integers with a bfloat16 scale for each 32 values of a row."""

    maps_weights = takes_packed = False
    reads_packed_files = maps_packed_files = True
    bits: ClassVar[int]

    def __init__(self, spec: EngineSpec, read_experts: ReadExperts, options: EngineOptions = DEFAULT_OPTIONS):
        super().__init__(spec, read_experts, options)
        self._file = None
        if options.packed_files is not None:
            record = ExpertsRecord.of(self.name, spec.shape, spec.fingerprint())
            self._file = open_experts(options.packed_files, spec.layer, spec.shape, self.packing(), record)

    @classmethod
    def auto(cls, merged: bool) -> bool:
        return False  # it loses precision, which must be wanted

    @classmethod
    def memory(cls, shape: ExpertsShape, rank: int, itemsize: float, options: EngineOptions) -> LayerMemory:
        count, nbytes = layer_size(shape, cls.packing())
        lora = super().memory(shape, rank, itemsize, options).lora
        if options.packed_files is None:
            return LayerMemory(count * nbytes, lora, int(shape.num_weights // count * itemsize))
        if options.mapped:
            return LayerMemory(0, lora, 0)
        return LayerMemory(count * nbytes, lora, min(count, _at_once(nbytes)) * nbytes)

    @classmethod
    def packing(cls) -> Packing:
        return Packing(f"int{cls.bits}")

    def read_weights(self) -> Sequence[Experts]:
        """Expert after expert in one block, as a token reads them."""
        shape = self.spec.shape
        if self._file is None:
            block = empty_in_huge_pages(layer_size(shape, self.packing()), torch.uint8)
            return list(self.quantized(self.read_experts(None), block, shape, self.spec.layer))
        block = self._file.read()[EXPERTS]
        prefetch_pages(block)
        return list(experts_in(block if self.options.mapped else _copied(block), shape, self.packing()))

    @classmethod
    def quantized(
        cls, experts: Iterable[ExpertWeights], block: torch.Tensor, shape: ExpertsShape, layer: int
    ) -> Iterator[PackedExpert]:
        """Quantize experts into a block (:func:`layer_size`), one at a time.

        Raises:
            KTModelError: A weight is not finite.
        """
        for number, (expert, own) in enumerate(zip(experts, block, strict=True)):
            try:
                yield PackedExpert(*quantize_into(own, cls.packing(), expert))
            except ValueError as error:
                raise KTModelError(
                    f"Expert {number} of layer {layer} has {error}. Download or copy the checkpoint again."
                ) from error

    @property
    def nbytes(self) -> int:
        count, nbytes = layer_size(self.spec.shape, self.packing())
        return count * nbytes + sum(bias.nbytes for bias in self._biases or ())


def _copied(block: torch.Tensor) -> torch.Tensor:
    """A mapped layer's block in huge pages, where it lies as in the file; some experts at a time."""
    count, nbytes = block.shape
    own, some = empty_in_huge_pages((count, nbytes), torch.uint8), _at_once(nbytes)
    for part, mapped in zip(own.split(some), block.split(some), strict=True):
        part.copy_(mapped)
        drop_pages(mapped)
    return own


def _at_once(nbytes: int) -> int:
    """How many experts of this size are copied together: each copy starts threads and waits for the last."""
    return max(1, _COPY // nbytes)


_COPY = 64 * 2**20
"""bytes"""


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


INTEGERS: tuple[type[IntegerEngine], ...] = (Int8Engine, Int4Engine)
"""the engines whose weights ``llamafactory-kt quantize --method int8`` and ``int4`` writes"""

__all__ = ["INTEGERS", "Int4Engine", "Int8Engine", "IntegerEngine"]
