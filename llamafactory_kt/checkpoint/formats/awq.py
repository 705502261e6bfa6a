"""AWQ in AutoAWQ's layout ``gemm``: integers of 4 bits with scales and zero points for groups of columns.

Of a weight [out, in]: ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8] and ``scales`` [groups, out]. The eight
integers of a word belong to outputs 0, 2, 4, 6, 1, 3, 5, 7, from its lowest bits to its highest.

(awq/utils/packing_utils.py of AutoAWQ, and gptqmodel/quantization/awq/utils/packing_utils.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from ...ground.errors import KTModelError
from ...native.packed import ALL, PackedWeight, Packing
from ..stored import StoredTensor
from .format import FLOATS, Format, Shape, Wanted, grouped, offsets_of, scaled
from .packing import WORD, halves, unpack
from .values import Values

_BITS = 4
_PER_WORD = WORD // _BITS
_MIDDLE = 1 << (_BITS - 1)
"""the zero point of symmetric weights"""


class Awq(Format):
    """``quant_method: awq``."""

    title = "AWQ"
    end = ".weight"
    parts: ClassVar[Mapping[str, str]] = {"packed": ".qweight", "scale": ".scales", "zero": ".qzeros"}
    checked: ClassVar[Sequence[str]] = ("zero",)

    def __init__(self, group: int | None, symmetric: bool = False):
        self._group, self._symmetric = group, symmetric

    @classmethod
    def from_config(cls, values: Values) -> Format | None:
        if values.text("quant_method") != "awq":
            return None
        bits = values.integer("bits", "w_bit")
        version = (values.text("version", "checkpoint_format") or "gemm").lower()
        if bits != _BITS or version != "gemm":
            raise KTModelError(
                f"The AWQ checkpoint has bits: {bits}, version: {version} in {values.file}; 4 bits in the layout gemm are supported. Use "
                "the model's unquantized checkpoint."
            )
        group = values.group_size("group_size", "q_group_size", default=128)
        return cls(group, symmetric=not values.flag("zero_point", default=True))

    def label(self, parts: Mapping[str, StoredTensor]) -> str:
        return f"{self.title} INT{_BITS}" if "packed" in parts else super().label(parts)

    def wanted(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Mapping[str, Wanted]:
        out, width = shape[-2:]
        groups = self._groups(width)
        words = [out // _PER_WORD] if out % _PER_WORD == 0 else []  # no word is shared: other sizes cannot be stored
        return {
            "packed": Wanted([(width, count) for count in words], ["I32"]),
            "scale": Wanted([(groups, out)], FLOATS),
            "zero": Wanted([(groups, count) for count in words], ["I32"]),
        }

    def _groups(self, width: int) -> int:
        return width // self._group if self._group and width % self._group == 0 else 1

    def packing(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Packing | None:
        groups = self._groups(shape[-1])
        group = shape[-1] // groups if groups > 1 else ALL
        return grouped("int4", shape, parts["scale"], group=group, offsets=not self._symmetric)

    def packed(self, parts: Mapping[str, torch.Tensor], packing: Packing, shape: Shape) -> PackedWeight:
        codes, scale = halves(_outputs(parts["packed"])), parts["scale"].T.to(packing.scale_dtype).contiguous()
        offsets = offsets_of(_outputs(parts["zero"]), _MIDDLE, scale) if packing.has_offsets else None
        return PackedWeight(packing, codes, scale, offsets)

    def wrong_values(self, parts: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
        """Programs that take ``zero_point: false`` at its word do not read the zero points, others do."""
        if self._symmetric and bool((unpack(parts["zero"], _BITS) != _MIDDLE).any()):
            yield "zero", f"has zero points other than {_MIDDLE}, and config.json says zero_point: false"

    def rows(self, parts: Mapping[str, torch.Tensor], rows: slice, shape: Shape) -> torch.Tensor:
        words = slice(rows.start // _PER_WORD, rows.stop // _PER_WORD)
        return scaled(_outputs(parts["packed"][:, words]), parts["scale"][:, rows].T, _outputs(parts["zero"][:, words]))


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, out / 8] -> uint8 [out, n]."""
    order = unpack(words.T, _BITS).view(words.shape[1], words.shape[0], 2, _PER_WORD // 2)
    return order.permute(0, 3, 2, 1).reshape(-1, words.shape[0])
