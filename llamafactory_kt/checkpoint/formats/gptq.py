"""GPTQ, as AutoGPTQ and GPTQModel write it: integers of 4 or 8 bits, packed along the columns' dimension.

Of a weight [out, in]: ``qweight`` int32 [in * bits / 32, out]; ``scales`` [groups, out]; ``qzeros`` int32 [groups, out * bits / 32], the
zero points, less one in the first version of the format (``checkpoint_format: gptq``); ``g_idx`` [in], the group of each column, which
activation ordering (``desc_act``) makes irregular.

(gptqmodel/nn_modules/qlinear and gptqmodel/utils/model.py of the library; https://github.com/ModelCloud/GPTQModel)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from ...ground.errors import KTModelError
from ...native.packed import ALL, PackedWeight, Packing
from ..stored import StoredTensor
from .format import FLOATS, Format, Shape, Wanted, grouped, offsets_of, scaled, wrong_groups
from .packing import WORD, packed_width, unpack, unpacked_rows
from .values import Values

_ONES = {4: 0x11111111, 8: 0x01010101}
"""one in each integer of a word"""


class Gptq(Format):
    """``quant_method: gptq``."""

    title = "GPTQ"
    end = ".weight"
    parts: ClassVar[Mapping[str, str]] = {
        "packed": ".qweight",
        "scale": ".scales",
        "zero": ".qzeros",
        "order": ".g_idx",
    }

    checked: ClassVar[Sequence[str]] = ("order", "zero")

    def __init__(self, group: int | None, *, first_version: bool, ordered: bool, symmetric: bool = False):
        self._group, self._first_version, self._ordered, self._symmetric = group, first_version, ordered, symmetric

    @classmethod
    def from_config(cls, values: Values) -> Format | None:
        if values.text("quant_method") != "gptq":
            return None
        bits, form = values.integer("bits"), values.text("checkpoint_format", "format") or "gptq"
        group = values.group_size("group_size", default=128)
        other = [
            name
            for name, changes in values.sections("dynamic").items()
            if not name.startswith("-") and not cls.reads(changes, group)
        ]
        if bits not in _ONES or form not in ("gptq", "gptq_v2") or other:
            raise KTModelError(
                f"The GPTQ checkpoint has bits: {bits}, checkpoint_format: {form}, dynamic: {other or None} in {values.file}; 4 and 8 bits "
                "in groups of one size, in the formats gptq and gptq_v2, are supported. Use the model's unquantized checkpoint."
            )
        ordered, symmetric = values.flag("desc_act", default=False), values.flag("sym", default=False)
        return cls(group, first_version=form == "gptq", ordered=ordered, symmetric=symmetric)

    @staticmethod
    def reads(changes: Values, group: int | None) -> bool:
        """Whether some layers' own settings can be read beside the others: the number of bits is told by the tensors' shapes."""
        return (
            changes.integer("bits", default=4) in _ONES
            and changes.group_size("group_size", default=group or -1) == group
        )

    def label(self, parts: Mapping[str, StoredTensor]) -> str:
        if "packed" not in parts or "zero" not in parts:
            return super().label(parts)
        return f"{self.title} INT{parts['zero'].shape[-1] * WORD // max(1, parts['packed'].shape[-1])}"

    def wanted(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Mapping[str, Wanted]:
        out, width = shape[-2:]
        groups = -(-width // self._group) if self._group else 1
        bits = _bits(parts["packed"].shape[0] if "packed" in parts else 0, width)
        return {
            "packed": Wanted([(packed_width(width, bits), out)], ["I32"]),
            "scale": Wanted([(groups, out)], FLOATS),
            "zero": Wanted([(groups, packed_width(out, bits))], ["I32"]),
            "order": Wanted([(width,)], ["I32", "I64"], optional=not self._ordered),
        }

    def wrong_values(self, parts: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
        if "order" in parts and (problem := wrong_groups(parts["order"], len(parts["scale"]))):
            yield "order", problem

    def decode(
        self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        width, groups = shape[1], len(parts["scale"])
        regular = self._regular(width).to(parts["zero"].device)
        order = parts["order"].long() if "order" in parts else regular
        found = {"packed": parts["packed"], "scale": parts["scale"], "zero": self._zeros(parts, width)}
        if width % groups or not torch.equal(order, regular):
            found["order"] = order
        return super().decode(found, shape, dtype)

    def _regular(self, width: int) -> torch.Tensor:
        """The group of each column where they are not ordered."""
        return torch.arange(width) // (self._group or width)

    def _zeros(self, parts: Mapping[str, torch.Tensor], width: int) -> torch.Tensor:
        """Zero points as they are, still packed."""
        if not self._first_version:
            return parts["zero"]
        # to whole words, as GPTQModel subtracts it: carries cross to the next integer
        return parts["zero"] + _ONES[_bits(len(parts["packed"]), width)]

    def packing(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Packing | None:
        if self._ordered:
            return None
        bits, group = _bits(parts["packed"].shape[0], shape[-1]), self._group or ALL
        return grouped(f"int{bits}", shape, parts["scale"], group=group, offsets=not self._symmetric)

    def can_pack(self, parts: Mapping[str, torch.Tensor], packing: Packing) -> bool:
        if "order" in parts and not torch.equal(parts["order"].long(), self._regular(len(parts["order"]))):
            return False
        middle = (1 << packing.bits - 1) - int(self._first_version)
        return packing.has_offsets or bool((unpack(parts["zero"], packing.bits) == middle).all())

    def packed(self, parts: Mapping[str, torch.Tensor], packing: Packing, shape: Shape) -> PackedWeight:
        out, width = shape
        words = parts["packed"].T.contiguous().view(torch.uint8)[:, : width * packing.bits // 8]
        codes = words if packing.bits == 4 else words ^ 1 << 7  # the kernels' have signs
        scale = parts["scale"].T.to(packing.scale_dtype).contiguous()
        if not packing.has_offsets:
            return PackedWeight(packing, codes, scale)
        zeros = unpacked_rows(self._zeros(parts, width).T, packing.bits, slice(0, out))
        return PackedWeight(packing, codes, scale, offsets_of(zeros, 1 << packing.bits - 1, scale))

    def rows(self, parts: Mapping[str, torch.Tensor], rows: slice, shape: Shape) -> torch.Tensor:
        bits = _bits(len(parts["packed"]), shape[1])
        values = unpack(parts["packed"][:, rows].T, bits)[:, : shape[1]]
        zeros = unpacked_rows(parts["zero"].T, bits, rows)
        return scaled(values, parts["scale"][:, rows].T, zeros, parts.get("order"))


def _bits(words: int, width: int) -> int:
    """How many bits the integers have, of which so many words hold a row."""
    return 8 if words == packed_width(width, 8) else 4
