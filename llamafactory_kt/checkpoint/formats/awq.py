"""AWQ in AutoAWQ's layout ``gemm``: integers of 4 bits with scales and zero points for groups of columns.

Of a weight [out, in]: ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8] and ``scales`` [groups, out]. The eight
integers of a word belong to outputs 0, 2, 4, 6, 1, 3, 5, 7, from its lowest bits to its highest.

(awq/utils/packing_utils.py of AutoAWQ, and gptqmodel/quantization/awq/utils/packing_utils.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ...ground.errors import KTModelError
from ..stored import StoredTensor
from .format import FLOATS, Format, Shape, Wanted, scaled
from .packing import WORD, unpack

_BITS = 4
_PER_WORD = WORD // _BITS


class Awq(Format):
    """``quant_method: awq``."""

    title = "AWQ"
    end = ".weight"
    parts: ClassVar[Mapping[str, str]] = {"packed": ".qweight", "scale": ".scales", "zero": ".qzeros"}

    def __init__(self, group: int):
        self._group = group

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Format | None:
        if values.get("quant_method") != "awq":
            return None
        bits = values.get("bits", values.get("w_bit"))
        version = str(values.get("version") or values.get("checkpoint_format") or "gemm").lower()
        if bits != _BITS or version != "gemm" or not values.get("zero_point", True):
            raise KTModelError(
                f"The AWQ checkpoint has bits: {bits}, version: {version}, zero_point: {values.get('zero_point', True)} in config.json; 4 "
                "bits with zero points in the layout gemm are supported. Use the model's unquantized checkpoint."
            )
        return cls(values.get("group_size", values.get("q_group_size", 128)))

    def label(self, parts: Mapping[str, StoredTensor]) -> str:
        return f"{self.title} INT{_BITS}" if "packed" in parts else super().label(parts)

    def wanted(self, name: str, shape: Shape) -> Mapping[str, Wanted]:
        out, width = shape[-2:]
        groups = width // self._group if self._group > 0 and width % self._group == 0 else 1
        words = [out // _PER_WORD] if out % _PER_WORD == 0 else []  # no word is shared: other sizes cannot be stored
        return {
            "packed": Wanted([(width, count) for count in words], ["I32"]),
            "scale": Wanted([(groups, out)], FLOATS),
            "zero": Wanted([(groups, count) for count in words], ["I32"]),
        }

    def rows(self, parts: Mapping[str, torch.Tensor], rows: slice, shape: Shape) -> torch.Tensor:
        words = slice(rows.start // _PER_WORD, rows.stop // _PER_WORD)
        return scaled(_outputs(parts["packed"][:, words]), parts["scale"][:, rows].T, _outputs(parts["zero"][:, words]))


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, out / 8] -> uint8 [out, n]."""
    order = unpack(words.T, _BITS).view(words.shape[1], words.shape[0], 2, _PER_WORD // 2)
    return order.permute(0, 3, 2, 1).reshape(-1, words.shape[0])
