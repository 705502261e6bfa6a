"""kt-kernel's engines with LoRA: its SFT kernels, for AVX-512 BF16 or AMX."""

from __future__ import annotations

import logging

import torch

from ...adapters import ExpertLora
from ...adapters.expert_lora import mantissa
from ..base import Engine, Undo
from ..bounds import Bounds
from ..streams import wait_for_streams
from .engine import KTEngine
from .methods import Method
from .runtime import kernel_problem
from .sft_kernel import SftKernel

logger = logging.getLogger(__name__)


class SftEngine(KTEngine):
    """A kernel's LoRA rank and scaling are fixed when it is built: a smaller rank is padded with zeros, another scaling is
    folded into B, a larger rank builds a new kernel from the checkpoint."""

    _kernel: SftKernel

    @classmethod
    def problem(cls) -> str | None:
        return kernel_problem(cls.name, sft=True)

    @property
    def kernel(self) -> SftKernel:
        return self._kernel

    def load(self) -> None:
        self._kernel = self._build(self.spec.lora_rank, self.spec.lora_scaling)

    def _build(self, rank: int, scaling: float) -> SftKernel:
        kind = self._kind(rank, mantissa(scaling))
        return SftKernel(kind, self.spec.layer, self._weights(), verbose=self.options.verbose)

    def set_lora(self, lora: ExpertLora | None) -> Undo:
        wait_for_streams()
        kernel, rank = self._kernel, self.lora_rank
        tensors = kernel.lora
        if lora is not None and lora.rank > kernel.kind.rank:
            logger.warning(
                "layer %d: LoRA rank %d exceeds the rank %d this kernel was built for; reading the layer again.",
                self.spec.layer, lora.rank, kernel.kind.rank,
            )  # fmt: skip
            new = self._build(lora.rank, float(lora.scaling["gate"][0, 0]))
            new.set_lora(new.lora_tensors(lora))
            self._kernel = new
        else:
            kernel.set_lora(kernel.lora_tensors(lora) if lora is not None else None)
        self.lora_rank = lora.rank if lora is not None else 0

        def undo() -> None:
            wait_for_streams()
            if kernel.lora is not tensors:
                kernel.set_lora(tensors)
            self._kernel, self.lora_rank = kernel, rank

        return undo

    def nbytes_for_rank(self, rank: int) -> int:
        return self.nbytes if rank > self._kernel.kind.rank else 0

    @property
    def lora_nbytes(self) -> int:
        rank, packed = self._kernel.kind.rank, self.packed
        return 3 * packed.num_experts * rank * (packed.hidden + packed.intermediate) * 2 if self.lora_rank else 0


class AMXBF16(SftEngine):
    """bfloat16 weights. The name says AMX; the kernel also runs with AVX-512 BF16 alone."""

    name, aliases = "AMXBF16", ("AMXBF16_SFT",)
    method = Method(name, 16, 32)
    bits = 16
    weights_dtype = torch.bfloat16

    @classmethod
    def auto(cls, merged: bool) -> bool:
        return True


class AMXINT4(SftEngine):
    """4-bit weights, one scale a row; packed while loading, or before (``llamafactory-kt quantize``)."""

    name, aliases = "AMXINT4", ("AMXINT4_SFT",)
    method = Method(name, 4, 128, "AMXInt4_MOE")
    bits = 4
    reads_packed_files = True
    # With one scale a row, the error grows with the row: random weights lose 0.20 of the norm at 256 numbers a row and 0.28 at 2048,
    # single outputs up to 0.32. The LoRA effect passes through the same weights and is off by up to 0.15.
    bounds = Bounds(relative=0.4, strength=0.2)


class AMXINT8(SftEngine):
    """8-bit weights, one scale a row. The kernel only reads packed files."""

    name, aliases = "AMXINT8", ("AMXINT8_SFT",)
    method = Method(name, 8, 64, "AMXInt8_MOE")
    bits = 8
    reads_packed_files = needs_packed_files = True
    bounds = Bounds(relative=0.04)  # 8 bits lose 0.02 of a layer's norm

    @classmethod
    def measured_as(cls) -> type[Engine]:
        return AMXINT4  # which packs weights on the spot; the two share the cores with PyTorch alike
