"""FP8: float8_e4m3fn weights [out, in] with float scales, a weight being the stored number times its scale.

The scale stands beside the weight as ``weight_scale_inv`` or ``weight_scale``. What shares one scale:

- a block: [ceil(out / rows), ceil(in / columns)], as DeepSeek-V3 is published (README_WEIGHTS.md). Blocks at the lower and
  right edges may be smaller, as in ``kv_a_proj_with_mqa`` of the official checkpoints (576 rows), which transformers 5.6 refuses.
- a row: [out, 1] or [out], of ``fbgemm_fp8``, ModelOpt and llm-compressor.
- the whole weight: [1] or a single number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ...ground.errors import KTModelError
from ...native.packed import PackedWeight, Packing
from ..stored import StoredTensor
from .format import FLOATS, WHOLE, Format, Shape, Wanted, grouped, of_rows, scaled
from .values import Values

E4M3 = "F8_E4M3"
Block = tuple[int, int]
"""rows and columns that share a scale"""


class Fp8(Format):
    """``quant_method: fp8``: transformers' own FP8, with a scale per block or per weight."""

    title = "FP8"
    parts: ClassVar[Mapping[str, str]] = {WHOLE: "", "scale": "_scale_inv"}
    in_place: ClassVar[Sequence[str]] = (WHOLE, "scale")

    def __init__(self, block: Block | None):
        self.block = block

    @classmethod
    def from_config(cls, values: Values) -> Format | None:
        if values.text("quant_method") != "fp8" or is_autofp8(values):
            return None
        form = values.text("fmt", default="e4m3")
        if form not in ("e4m3", "float8_e4m3fn"):  # the second is MiniMax's name
            raise KTModelError(
                f"The FP8 checkpoint has fmt: {form} in {values.file}; only e4m3 is supported. Use the model's unquantized checkpoint."
            )
        return cls(values.block("weight_block_size"))

    def wanted(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Mapping[str, Wanted]:
        return {WHOLE: Wanted([shape], [E4M3]), "scale": scales(shape, self.block)}

    def rows(self, parts: Mapping[str, torch.Tensor], rows: slice, shape: Shape) -> torch.Tensor:
        return dequantize(parts[WHOLE][rows], parts["scale"], rows, self.block)

    def packing(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Packing | None:
        return grouped("e4m3", shape, parts["scale"], block=self.block)

    def packed(self, parts: Mapping[str, torch.Tensor], packing: Packing, shape: Shape) -> PackedWeight:
        return of_bytes(parts[WHOLE], parts["scale"], packing)


class ScaledFp8(Fp8):
    """FP8 with ``weight_scale`` per row or per weight: ``quant_method: fbgemm_fp8``, ``modelopt``, and ``fp8`` by AutoFP8."""

    end = ".weight"
    parts: ClassVar[Mapping[str, str]] = {WHOLE: ".weight", "scale": ".weight_scale"}

    @classmethod
    def from_config(cls, values: Values) -> Format | None:
        method = values.text("quant_method")
        if method == "modelopt":
            algorithm = modelopt_algorithm(values)
            if algorithm is None:
                return Format()  # only the cache is quantized
            if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
                raise KTModelError(
                    f"The checkpoint was quantized by ModelOpt with quant_algo: {algorithm} in {values.file}; NVFP4, and FP8 with a scale "
                    "for each weight or row are supported. Use the model's unquantized checkpoint."
                )
        elif method != "fbgemm_fp8" and not is_autofp8(values):
            return None
        return cls(None)


def modelopt_algorithm(values: Values) -> str | None:
    """How NVIDIA's ModelOpt quantized the weights; None if it did not."""
    if values.text("quant_method") != "modelopt":
        return None
    return values.text("quant_algo") or values.section("quantization").text("quant_algo")


def is_autofp8(values: Values) -> bool:
    """Whether AutoFP8 wrote a ``quantization_config``, with its own name for ``modules_to_not_convert`` and without a block size, which
    transformers always writes, be it null."""
    found = values.found
    return values.text("quant_method") == "fp8" and "ignored_layers" in found and "weight_block_size" not in found


def scales(shape: Shape, block: Block | None) -> Wanted:
    """The scales of a weight [..., out, in]."""
    *experts, out, width = shape
    if block is not None:
        return Wanted([(*experts, -(-out // block[0]), -(-width // block[1]))], (*FLOATS, "F8_E8M0"))
    return Wanted([tuple(experts), (*experts, 1), (*experts, out), (*experts, out, 1), (*experts, 1, 1)], FLOATS)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, rows: slice, block: Block | None) -> torch.Tensor:
    """Some rows of a weight, [n, in] in float8 or int8, with the scales of the whole -> [n, in] in float32."""
    values = widened(weight)
    if block is None:
        return scaled(values, of_rows(scale, rows))
    groups = torch.arange(rows.start, rows.stop, device=scale.device) // block[0]
    if values.shape[1] % block[1] == 0:
        return scaled(values, scale.float()[groups])
    order = torch.arange(values.shape[1], device=scale.device) // block[1]
    return scaled(values, scale.float()[groups], order=order)


def of_bytes(weight: torch.Tensor, scale: torch.Tensor, packing: Packing) -> PackedWeight:
    """A weight [out, in] in float8 or int8, as it is."""
    return PackedWeight(packing, weight.view(torch.uint8), of_rows(scale, slice(None)).to(packing.scale_dtype))


def widened(weight: torch.Tensor) -> torch.Tensor:
    """The numbers in float32. torch converts float8 one by one; a float16 has room for its bits, with another exponent bias."""
    if weight.dtype is not torch.float8_e4m3fn:
        return weight.to(torch.float32)
    codes = weight.view(torch.uint8).to(torch.int16)
    magnitudes = codes & 0x7F
    if int(magnitudes.max()) == 0x7F:  # NaN, which has other bits in a float16
        return weight.to(torch.float32)
    halves = (codes & 0x80).bitwise_left_shift_(8).bitwise_or_(magnitudes.bitwise_left_shift_(7)).view(torch.float16)
    return halves.to(torch.float32).mul_(2.0 ** (15 - 7))
