"""Writing safetensors one tensor at a time, so that no more than one layer is in memory.

The format (huggingface/safetensors, README): eight bytes with the header's length, little-endian; a JSON header with each
tensor's dtype, shape and byte range, which may end in blanks; the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from .stores import DTYPES

_ENTRY = 200
"""bytes reserved in the header for one tensor's dtype, shape and byte range"""
_ALIGNMENT = 64
"""bytes: the first tensor begins with a line of the CPU's caches where the file is mapped"""


def write_safetensors(
    path: Path, names: Collection[str], tensors: Iterable[tuple[str, torch.Tensor]], metadata: dict[str, str] | None
) -> None:
    """Write the tensors as they come.

    Args:
        names: the tensors' names, in any order; they reserve the room of the header at the start of the file.

    Raises:
        ValueError: The tensors that came are not the ones that were named.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    room = len(json.dumps(header)) + sum(len(json.dumps(name)) + _ENTRY for name in names)
    room += -(8 + room) % _ALIGNMENT
    offset = 0
    with path.open("wb") as file:
        file.seek(8 + room)
        for name, tensor in tensors:
            end = offset + tensor.nbytes
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        if (came := header.keys() - {"__metadata__"}) != set(names):
            raise ValueError(f"{path}: {len(names)} tensors were announced, {len(came)} came")
        file.seek(0)
        file.write(room.to_bytes(8, "little"))
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(room))
