"""compressed-tensors, as llm-compressor writes it (Kimi-K2-Thinking among others). Of its formats these are read:

- ``pack-quantized``: integers of 4 or 8 bits, offset by half their range and packed along the rows, ``weight_packed`` int32
  [out, ceil(in * bits / 32)]; ``weight_scale`` [out, groups], where one group is a whole row or ``group_size`` columns;
  ``weight_shape``, which the model knows too; for asymmetric weights ``weight_zero_point``, packed along the columns, int32
  [ceil(out * bits / 32), groups]; with activation ordering ``weight_g_idx`` [in], the group of each column; filled with -1 where the
  order is the usual one.
- ``nvfp4-pack-quantized``: see :mod:`.nvfp4`.
- ``int-quantized``, ``float-quantized`` and ``naive-quantized``: ``weight`` as int8 or float8_e4m3fn, with ``weight_scale`` per weight,
  row, group or block, and ``weight_zero_point`` for asymmetric integers.

(compressed_tensors/compressors of the library; https://github.com/vllm-project/compressed-tensors)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...ground.errors import KTModelError
from ...native.packed import PackedWeight, Packing
from ..stored import StoredTensor
from .format import FLOATS, WHOLE, Format, Shape, Wanted, grouped, of_rows, offsets_of, scaled, wrong_groups
from .fp8 import E4M3, Block, dequantize, of_bytes, scales, widened
from .nvfp4 import nvfp4, nvfp4_wanted
from .packing import packed_width, unpack, unpacked_rows
from .values import Values

_BYTES = (("int", 8), ("float", 8))
_READ = {
    "pack-quantized": (("int", 4), ("int", 8)), "nvfp4-pack-quantized": (("float", 4),), "int-quantized": _BYTES,
    "float-quantized": _BYTES, "naive-quantized": _BYTES,
}  # fmt: skip
"""format -> type and number of bits"""
_ORDERED = (True, "group", "dynamic")
"""values of ``actorder`` with which columns are not grouped as they stand"""


@dataclass(frozen=True)
class Scheme:
    """How one ``config_group`` stores its weights."""

    bits: int
    kind: str
    """``int`` or ``float``"""
    packed: bool
    symmetric: bool
    group: int | None
    """columns that share a scale"""
    block: Block | None
    ordered: bool
    """whether the columns of a group may stand anywhere"""
    targets: tuple[str, ...]

    @classmethod
    def of(cls, group: Values, default: str) -> Scheme:
        """Args:
            group: an entry of ``config_groups``.
            default: the checkpoint's own format.

        Raises:
            KTModelError: It cannot be read.
        """
        weights, form = group.section("weights"), group.text("format", default=default) or default
        bits, kind = weights.integer("num_bits", default=8) or 8, weights.text("type", default="int") or "int"
        strategy, symmetric = weights.text("strategy"), weights.flag("symmetric", default=True)
        readable = (kind, bits) in _READ.get(form, ()) and (strategy != "block" or symmetric)
        if not readable or strategy not in (None, "tensor", "channel", "group", "block", "tensor_group"):
            raise KTModelError(
                f"The compressed-tensors checkpoint has weights of format: {form}, type: {kind}, num_bits: {bits}, strategy: {strategy}, "
                f"symmetric: {symmetric} in {group.file}; {', '.join(_READ)} with integers of 4 or 8 bits, FP8 or NVFP4 are supported. Use "
                "the model's unquantized checkpoint."
            )
        return cls(
            bits, kind, form.endswith("pack-quantized"), symmetric, weights.group_size("group_size"),
            weights.block("block_structure") if strategy == "block" else None, weights.found.get("actorder") in _ORDERED,
            tuple(group.patterns("targets")),
        )  # fmt: skip

    @property
    def is_nvfp4(self) -> bool:
        return self.packed and self.kind == "float"

    def groups(self, width: int) -> int:
        """How many groups a row has."""
        return width // self.group if self.group and width % self.group == 0 else 1

    def __str__(self) -> str:
        return "NVFP4" if self.is_nvfp4 else f"INT{self.bits}"

    def matches(self, module: str) -> bool:
        """Whether a module is meant: by its name, by ``re:`` and a pattern, or by its class, which can only be ``Linear``."""
        return any(
            re.match(target[3:], module) if target.startswith("re:") else target in (module, "Linear")
            for target in self.targets
        )


class CompressedTensors(Format):
    """``quant_method: compressed-tensors``."""

    title = "compressed-tensors"
    end = ".weight"
    parts: ClassVar[Mapping[str, str]] = {
        WHOLE: ".weight", "packed": ".weight_packed", "scale": ".weight_scale", "zero": ".weight_zero_point",
        "order": ".weight_g_idx", "shape": ".weight_shape", "divisor": ".weight_global_scale",
    }  # fmt: skip
    checked: ClassVar[Sequence[str]] = ("order",)
    in_place: ClassVar[Sequence[str]] = (WHOLE, "packed", "scale")

    def __init__(self, schemes: list[Scheme]):
        self._schemes = schemes

    @classmethod
    def from_config(cls, values: Values) -> Format | None:
        if values.text("quant_method") != "compressed-tensors":
            return None
        if values.section("sparsity_config").text("format", default="dense") != "dense":
            raise KTModelError(
                f"The compressed-tensors checkpoint is sparse (sparsity_config in {values.file}), which is not supported. Use the model's "
                "unquantized checkpoint."
            )
        form = values.text("format", default="dense") or "dense"
        schemes = [Scheme.of(group, form) for group in values.sections("config_groups").values()]
        if not schemes and not values.section("kv_cache_scheme").found:
            raise KTModelError(
                f"The compressed-tensors checkpoint has no config_groups in {values.file}, which say how weights are stored. Restore the file "
                "from where the checkpoint was published."
            )
        return cls(schemes) if schemes else Format()  # only the cache is quantized

    def label(self, parts: Mapping[str, StoredTensor]) -> str:
        return super().label(parts) if "packed" not in parts else str(self._scheme(parts["packed"].name))

    def _scheme(self, name: str) -> Scheme:
        module = name.rpartition(".")[0]
        # A name or pattern says more than a class, as in the library.
        named = [scheme for scheme in self._schemes if "Linear" not in scheme.targets and scheme.matches(module)]
        return (named or [scheme for scheme in self._schemes if scheme.matches(module)] or self._schemes)[0]

    def wanted(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Mapping[str, Wanted]:
        scheme, (out, width) = self._scheme(name), shape[-2:]
        if scheme.is_nvfp4:
            return dict(zip(("packed", "scale", "divisor"), nvfp4_wanted(shape), strict=True))
        groups = scheme.groups(width)
        scale = Wanted([(out, groups)], FLOATS) if scheme.group else scales(shape, scheme.block)
        found = {"scale": scale}
        if scheme.packed:
            found["packed"] = Wanted([(out, packed_width(width, scheme.bits))], ["I32"])
            found["shape"] = Wanted([(2,)], ["I64", "I32"], optional=True)
            found["order"] = Wanted([(width,)], ["I32", "I64"], optional=not scheme.ordered)
            zero = Wanted([(packed_width(out, scheme.bits), groups)], ["I32"])
        else:
            found[WHOLE] = Wanted([shape], [E4M3 if scheme.kind == "float" else "I8"])
            # Older versions store the zeros of symmetric weights too.
            zero = Wanted(scale.shapes, ["I8"], optional=scheme.symmetric)
        return found if scheme.symmetric and scheme.packed else {**found, "zero": zero}

    def wrong_values(self, parts: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
        if _is_ordered(parts) and (problem := wrong_groups(parts["order"], parts["scale"].shape[1])):
            yield "order", problem

    def rows(self, parts: Mapping[str, torch.Tensor], rows: slice, shape: Shape) -> torch.Tensor:
        scale, zero, width = parts["scale"], parts.get("zero"), shape[1]
        if "divisor" in parts:
            return nvfp4(parts["packed"][rows], scale[rows].float() / parts["divisor"])
        if "packed" in parts:
            bits = 4 if parts["packed"].shape[1] == packed_width(width, 4) else 8
            values = unpack(parts["packed"][rows], bits)[:, :width]
            middle = 1 << (bits - 1)  # was added to weights and zero points before they were packed
            zeros = unpacked_rows(zero, bits, rows) if zero is not None else middle
            order = parts["order"].long() if _is_ordered(parts) else None
            return scaled(values, of_rows(scale, rows), zeros, order)
        for block in (scheme.block for scheme in self._schemes if scheme.block is not None):
            if tuple(scale.shape) in scales(shape, block).shapes:
                return dequantize(parts[WHOLE][rows], scale, rows, block)
        return scaled(widened(parts[WHOLE][rows]), of_rows(scale, rows), of_rows(zero, rows) if zero is not None else 0)

    def packing(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Packing | None:
        scheme, scale = self._scheme(name), parts["scale"]
        offsets = "zero" in parts
        if scheme.is_nvfp4 or scheme.ordered or (scheme.packed and scheme.bits != 4) or (offsets and not scheme.packed):
            return None
        kind = "e4m3" if scheme.kind == "float" else f"int{scheme.bits}"
        group = shape[-1] // scheme.groups(shape[-1]) if scheme.group else None
        return grouped(kind, shape, scale, group=group, block=scheme.block, offsets=offsets)

    def can_pack(self, parts: Mapping[str, torch.Tensor], packing: Packing) -> bool:
        return not _is_ordered(parts)

    def packed(self, parts: Mapping[str, torch.Tensor], packing: Packing, shape: Shape) -> PackedWeight:
        if "packed" not in parts:
            return of_bytes(parts[WHOLE], parts["scale"], packing)
        codes = parts["packed"].view(torch.uint8)[:, : shape[1] * packing.bits // 8]  # the table takes the middle off
        found = of_bytes(codes, parts["scale"], packing)
        if "zero" not in parts:
            return found
        zeros = unpacked_rows(parts["zero"], packing.bits, slice(0, shape[0]))
        return replace(found, offsets=offsets_of(zeros, 1 << packing.bits - 1, found.scales))


def _is_ordered(parts: Mapping[str, torch.Tensor]) -> bool:
    return "order" in parts and bool((parts["order"] != -1).any())
