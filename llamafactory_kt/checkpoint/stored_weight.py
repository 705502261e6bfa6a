"""A weight of a checkpoint, whatever tensors a format stores in its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..ground.errors import KTModelError
from .formats import WHOLE, Format, Shape
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

    def decode(self, pages: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight in ``dtype``, from the parts that were read; of a fused weight, from those of one expert.

        Raises:
            KTModelError: As :meth:`check_values`.
        """
        if not self.quantized:
            return pages[WHOLE].to(dtype)
        self.check_values(pages)
        return self.format.decode(pages, self.shape[-2:], dtype)
