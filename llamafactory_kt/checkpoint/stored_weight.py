"""A weight of a checkpoint, whatever tensors a format stores in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..ground.errors import KTModelError
from ..native.packed import PackedWeight, Packing
from .formats import READ, WHOLE, Format, Shape
from .stored import StoredTensor

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""dtype in memory if no conversion is asked for; quantized weights become bfloat16, as LLaMA-Factory dequantizes them"""


@dataclass
class StoredWeight:
    """A weight of the checkpoint: one tensor, or what a format stores in its place."""

    name: str
    """without the format's endings, as the unquantized checkpoint has it"""
    format: Format
    parts: dict[str, StoredTensor] = field(default_factory=dict)
    shape: Shape = ()
    """of the decoded weight, when it is known"""

    @property
    def quantized(self) -> bool:
        return self.format.is_quantized(self.parts)

    @property
    def file(self) -> Path:
        """For messages: that of the first part."""
        return next(iter(self.parts.values())).file

    @property
    def label(self) -> str:
        """How it is stored, as ``BF16`` or ``INT4``."""
        return self.format.label(self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """In memory, if no conversion is asked for."""
        return torch.bfloat16 if self.quantized else _TORCH[self.parts[WHOLE].dtype]

    def fit(self, shapes: Iterable[Shape]) -> list[str]:
        """Find the :attr:`shape` of a quantized weight among those that it may have; what is wrong, and where, if none fits."""
        first: list[str] | None = None
        for shape in shapes:
            problems = [f"{problem} in {self.file}" for problem in self.format.problems(self.name, self.parts, shape)]
            if not problems:
                self.shape = shape
                return []
            first = first or problems
        return first or []

    def check_values(self, pages: Mapping[str, torch.Tensor]) -> None:
        """Check what shapes do not tell, of the parts that were read.

        Raises:
            KTModelError: Numbers in them cannot be decoded.
        """
        for part, problem in self.format.wrong_values(pages):
            raise KTModelError(
                f"{self.parts[part].file}: {self.parts[part].name} {problem}. Download or copy the file again."
            )

    @property
    def packing(self) -> Packing | None:
        """How the native kernels can use a weight whose :attr:`shape` is known as it is, told by headers; None if they cannot."""
        found = self.format.packing(self.name, self.shape, self.parts) if self.quantized else None
        return found if found is not None and found.fits(self.rows[1]) else None

    @property
    def sizes(self) -> tuple[int, int]:
        """Of one weight; of a fused one, of one expert's."""
        first, second = (self.shape or self.parts[WHOLE].shape)[-2:]
        return first, second

    @property
    def turned(self) -> bool:
        """Whether the rows that are stored are columns."""
        return self.quantized and self.format.turned

    @property
    def rows(self) -> tuple[int, int]:
        """:attr:`sizes` of the rows that are stored."""
        return self.sizes[::-1] if self.turned else self.sizes

    @property
    def in_place(self) -> int:
        """Bytes of the parts that the native kernels read where they are stored."""
        parts = ((name, part) for name, part in self.parts.items() if name in self.format.in_place)
        return sum(part.nbytes for name, part in parts if name != "scale" or part.dtype in READ)

    def can_pack(self, read: Callable[[StoredTensor], torch.Tensor], packing: Packing) -> bool:
        """Whether numbers that headers do not tell allow :attr:`packing`."""
        parts = {part: read(self.parts[part]) for part in self.format.checked if part in self.parts}
        return self.format.can_pack(parts, packing)

    def packed(self, pages: Mapping[str, torch.Tensor], packing: Packing) -> PackedWeight:
        """The weight for the native kernels, from the parts that were read; of a fused weight, from those of one expert.

        Raises:
            KTModelError: A scale is not finite.
        """
        found = self.format.packed(pages, packing, self.rows)
        if not bool(found.scales.isfinite().all()):
            raise KTModelError(
                f"{self.file}: {self.name} has scales that are not finite. Download or copy the checkpoint again."
            )
        return found

    def decode(self, pages: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight in ``dtype``, from the parts that were read; of a fused weight, from those of one expert.

        Raises:
            KTModelError: As :meth:`check_values`.
        """
        if not self.quantized:
            return pages[WHOLE].to(dtype)
        self.check_values(pages)
        return self.format.decode(pages, self.shape[-2:], dtype)
