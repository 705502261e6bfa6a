"""GPTQ, as AutoGPTQ and GPTQModel write it: integers of 4 or 8 bits, packed along the columns' dimension.

Of a weight [out, in]: ``qweight`` int32 [in * bits / 32, out]; ``scales`` [groups, out]; ``qzeros`` int32 [groups, out * bits / 32], the
zero points, less one in the first version of the format (``checkpoint_format: gptq``); ``g_idx`` [in], the group of each column, which
activation ordering (``desc_act``) makes irregular.

(gptqmodel/nn_modules/qlinear and gptqmodel/utils/model.py of the library; https://github.com/ModelCloud/GPTQModel)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ...ground.errors import KTModelError
from ..stored import StoredTensor
from .format import FLOATS, Format, Shape, Wanted, scaled
from .packing import packed_width, unpack, unpacked_rows

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

    def __init__(self, bits: int, group: int, first_version: bool):
        self._bits, self._group, self._first_version = bits, group, first_version

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Format | None:
        if values.get("quant_method") != "gptq":
            return None
        bits, group = values.get("bits"), values.get("group_size", 128)
        form = values.get("checkpoint_format") or values.get("format") or "gptq"
        other = [
            name for name, changes in (values.get("dynamic") or {}).items() if changes and not name.startswith("-")
        ]
        if bits not in _ONES or form not in ("gptq", "gptq_v2") or other:
            raise KTModelError(
                f"The GPTQ checkpoint has bits: {bits}, checkpoint_format: {form}, dynamic: {other or None} in config.json; 4 and 8 "
                "bits for all layers alike, in the formats gptq and gptq_v2, are supported. Use the model's unquantized checkpoint."
            )
        return cls(bits, group, form == "gptq")

    def label(self, parts: Mapping[str, StoredTensor]) -> str:
        return f"{self.title} INT{self._bits}" if "packed" in parts else super().label(parts)

    def wanted(self, name: str, shape: Shape) -> Mapping[str, Wanted]:
        out, width = shape[-2:]
        groups = -(-width // self._group) if self._group > 0 else 1
        return {
            "packed": Wanted([(packed_width(width, self._bits), out)], ["I32"]),
            "scale": Wanted([(groups, out)], FLOATS),
            "zero": Wanted([(groups, packed_width(out, self._bits))], ["I32"]),
            "order": Wanted([(width,)], ["I32", "I64"], optional=True),
        }

    def decode(
        self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        width, groups, zero = shape[1], len(parts["scale"]), parts["zero"]
        regular = torch.arange(width, device=zero.device) // (self._group if self._group > 0 else width)
        order = parts["order"].long() if "order" in parts else regular
        found = {"packed": parts["packed"], "scale": parts["scale"], "zero": zero}
        if self._first_version:  # to whole words, as GPTQModel subtracts it: carries cross to the next integer
            found["zero"] = zero + _ONES[self._bits]
        if width % groups or not torch.equal(order, regular):
            found["order"] = order
        return super().decode(found, shape, dtype)

    def rows(self, parts: Mapping[str, torch.Tensor], rows: slice, shape: Shape) -> torch.Tensor:
        values = unpack(parts["packed"][:, rows].T, self._bits)[:, : shape[1]]
        zeros = unpacked_rows(parts["zero"].T, self._bits, rows)
        return scaled(values, parts["scale"][:, rows].T, zeros, parts.get("order"))
