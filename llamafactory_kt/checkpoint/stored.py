"""What safetensors files hold, told by their headers, and a function that reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..ground.errors import KTModelError
from ..ground.tensor_files import bits


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint's files."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name"""

    @property
    def nbytes(self) -> int:
        """On disk."""
        return prod(self.shape) * bits(self.dtype) // 8


def stored_tensors(file: Path) -> Iterator[StoredTensor]:
    """The tensors of a file.

    Raises:
        KTModelError: It is damaged or not safetensors.
    """
    if file.suffix != ".safetensors":
        raise KTModelError(f"{file}: experts are read from safetensors files only; convert the checkpoint first.")
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                piece = handle.get_slice(name)
                yield StoredTensor(name, file, tuple(piece.get_shape()), piece.get_dtype())
    except (SafetensorError, OSError) as error:
        raise KTModelError(f"{file} cannot be read as safetensors ({error}); download or copy it again.") from error


def opened() -> Callable[[StoredTensor], torch.Tensor]:
    """A function that reads tensors as views of their mapped files, and opens each file once."""
    handle = cache(lambda file: safe_open(file, framework="pt", device="cpu"))
    return lambda tensor: handle(tensor.file).get_tensor(tensor.name)
