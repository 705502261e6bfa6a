"""What safetensors files hold, told by their headers, and a function that reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..ground.errors import KTModelError
from ..ground.tensors.safetensors_files import open_mapped, read_header, read_tensor
from ..ground.tensors.stores import bits


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
        for name, tensor in read_header(file)[0].items():
            yield StoredTensor(name, file, tensor.shape, tensor.dtype)
    except (SafetensorError, OSError) as error:
        raise KTModelError(f"{file} cannot be read as safetensors ({error}); download or copy it again.") from error


def opened() -> Callable[[StoredTensor], torch.Tensor]:
    """A function that reads tensors as views of their mapped files, and opens each file once."""
    handle = cache(open_mapped)
    return lambda tensor: read_tensor(handle(tensor.file), tensor.name)


def fingerprint(tensors: Iterable[StoredTensor]) -> str:
    """A hash that tells weights from others without reading them all: of names, shapes, dtypes, and each tensor's first row."""
    digest, get = hashlib.sha256(), opened()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        row = get(tensor).reshape(-1)[: tensor.shape[-1] if tensor.shape else 1]
        digest.update(f"{tensor.name} {tensor.shape} {tensor.dtype}".encode())
        digest.update(row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
