"""NVFP4: four-bit floats (E2M1), a float8_e4m3fn scale for each 16 columns, and a float32 one for the whole weight [out, in].

The numbers are uint8 [out, in / 2], the first of a byte's two in its lower half, and the scales [out, in / 16]. NVIDIA's ModelOpt stores
them as ``weight``, ``weight_scale`` and ``weight_scale_2``, of which all are multiplied; compressed-tensors stores ``weight_packed``,
``weight_scale`` and ``weight_global_scale``, by which it divides.

(modelopt/torch/quantization/qtensor/nvfp4_tensor.py; compressed_tensors/compressors/nvfp4)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from ..stored import StoredTensor
from .format import WHOLE, Format, Shape, Wanted, scaled
from .fp8 import E4M3, modelopt_algorithm
from .mxfp4 import e2m1
from .packing import unpack
from .values import Values

GROUP = 16
"""columns that share a scale"""


class Nvfp4(Format):
    """``quant_method: modelopt`` with ``quant_algo: NVFP4``."""

    title = "NVFP4"
    end = ".weight"
    parts: ClassVar[Mapping[str, str]] = {WHOLE: ".weight", "scale": ".weight_scale", "factor": ".weight_scale_2"}

    @classmethod
    def from_config(cls, values: Values) -> Format | None:
        return cls() if modelopt_algorithm(values) == "NVFP4" else None

    def label(self, parts: Mapping[str, StoredTensor]) -> str:
        return self.title if "scale" in parts else super().label(parts)

    def wanted(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Mapping[str, Wanted]:
        codes, scale, factor = nvfp4_wanted(shape)
        return {WHOLE: codes, "scale": scale, "factor": factor}

    def rows(self, parts: Mapping[str, torch.Tensor], rows: slice, shape: Shape) -> torch.Tensor:
        return nvfp4(parts[WHOLE][rows], parts["scale"][rows].float() * parts["factor"])


def nvfp4_wanted(shape: Shape) -> tuple[Wanted, Wanted, Wanted]:
    """The codes, the scales and the whole weight's factor."""
    *experts, out, width = shape
    whole = width % GROUP == 0  # other widths fit no groups, and are found so
    return (
        Wanted([(*experts, out, width // 2)] if whole else [], ["U8"]),
        Wanted([(*experts, out, width // GROUP)] if whole else [], [E4M3]),
        Wanted([(*experts,), (*experts, 1)], ["F32"]),
    )


def nvfp4(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, in / 2] and float32 [rows, in / 16] -> float32 [rows, in]."""
    return scaled(e2m1(unpack(codes, 4)), scale)
