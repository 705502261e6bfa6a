"""Writing a safetensors file tensor by tensor, so that no more than one is in memory.

The format (huggingface/safetensors, README): eight bytes with the header's length, little-endian; a JSON header that
gives each tensor's dtype, shape and byte range; the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from .store import TensorInfo


def write_safetensors(
    path: Path,
    infos: dict[str, TensorInfo],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: dict[str, str] | None,
) -> None:
    """Write the tensors in the order of ``infos``, whose shapes and dtypes they must have.

    Raises:
        ValueError: A tensor comes out of order or has another size than announced.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, info in infos.items():
        end = offset + info.nbytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    expected = iter(infos.items())
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, tensor in tensors:
            wanted, info = next(expected)
            if name != wanted or tensor.nbytes != info.nbytes or tuple(tensor.shape) != info.shape:
                raise ValueError(
                    f"{path}: {name} {tuple(tensor.shape)} does not follow; {wanted} {info.shape} was announced"
                )
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
