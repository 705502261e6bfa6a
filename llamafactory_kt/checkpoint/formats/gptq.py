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
from ..stored import StoredTensor
from .format import FLOATS, Format, Shape, Wanted, scaled, wrong_groups
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

    checked: ClassVar[Sequence[str]] = ("order",)

    def __init__(self, group: int | None, *, first_version: bool, ordered: bool):
        self._group, self._first_version, self._ordered = group, first_version, ordered

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
        return cls(group, first_version=form == "gptq", ordered=values.flag("desc_act", default=False))

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
        width, groups, zero = shape[1], len(parts["scale"]), parts["zero"]
        regular = torch.arange(width, device=zero.device) // (self._group or width)
        order = parts["order"].long() if "order" in parts else regular
        found = {"packed": parts["packed"], "scale": parts["scale"], "zero": zero}
        if self._first_version:  # to whole words, as GPTQModel subtracts it: carries cross to the next integer
            found["zero"] = zero + _ONES[_bits(len(parts["packed"]), width)]
        if width % groups or not torch.equal(order, regular):
            found["order"] = order
        return super().decode(found, shape, dtype)

    def rows(self, parts: Mapping[str, torch.Tensor], rows: slice, shape: Shape) -> torch.Tensor:
        bits = _bits(len(parts["packed"]), shape[1])
        values = unpack(parts["packed"][:, rows].T, bits)[:, : shape[1]]
        zeros = unpacked_rows(parts["zero"].T, bits, rows)
        return scaled(values, parts["scale"][:, rows].T, zeros, parts.get("order"))


def _bits(words: int, width: int) -> int:
    """How many bits the integers have, of which so many words hold a row."""
    return 8 if words == packed_width(width, 8) else 4
