"""safetensors files by their headers, which are read without mapping the file: a private mapping of more than the memory is refused.

The format (huggingface/safetensors, README): eight bytes with the header's length, little-endian; a JSON header with each tensor's
dtype, shape and byte range; the tensors' bytes, without gaps.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import KTMemoryError
from ..machine import available_memory, gib

_LONGEST = 100_000_000
"""bytes of a header, as safetensors allows them"""


@dataclass(frozen=True)
class Stored:
    """One tensor, by the header."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors' name"""
    start: int
    """bytes from the end of the header"""
    stop: int


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file, and its metadata.

    Raises:
        SafetensorError: It is damaged, incomplete, or not safetensors; safetensors itself would refuse it, too.
        OSError: It cannot be read.
    """
    size = file.stat().st_size
    if size < 8:  # of a pipe it is 0, and opening it would wait
        raise SafetensorError(f"it has {size} bytes")
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 2 <= length <= min(size - 8, _LONGEST):
            raise SafetensorError(f"its header would have {length} bytes, the file has {size}")
        text = handle.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _stored(entry) for name, entry in header.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise SafetensorError(f"its header is damaged: {error}") from error
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end or tensor.stop < tensor.start:
            raise SafetensorError(f"the bytes of {name} do not follow those before them")
        end = tensor.stop
    if size != 8 + length + end:
        raise SafetensorError(f"its tensors have {end} bytes, the file has {size - 8 - length} for them")
    return tensors, metadata


def _stored(entry: Any) -> Stored:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError(f"{entry} must have integers")
    if prod(shape) * _BITS[entry["dtype"]] != 8 * (stop - start):
        raise ValueError(f"{entry}: shape and bytes do not match")
    return Stored(shape, entry["dtype"], start, stop)


_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip


def open_mapped(file: Path) -> Any:
    """safetensors' handle of a file, which maps it, for PyTorch on the CPU.

    Raises:
        SafetensorError: As :func:`read_header`.
        OSError: The file cannot be read.
        KTMemoryError: The system refuses to map a file of this size.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (RuntimeError, OSError) as error:
        if getattr(error, "errno", None) != errno.ENOMEM and "Cannot allocate memory" not in str(error):
            raise
        raise KTMemoryError(
            f"{file} is one file of {gib(file.stat().st_size)}, and the system maps no file that is larger than memory and swap "
            f"({gib(available_memory())} are free). Save the model in shards (save_pretrained with max_shard_size), use a machine with "
            "more memory, or let the system map it: sysctl vm.overcommit_memory=1."
        ) from error


def read_tensor(handle: Any, name: str) -> torch.Tensor:
    """A tensor of :func:`open_mapped`'s handle.

    Raises:
        KeyboardInterrupt: Also where PyTorch made another error of it.
    """
    try:
        tensor: torch.Tensor = handle.get_tensor(name)
    except ValueError as error:
        if is_interrupt(error):
            raise KeyboardInterrupt from error
        raise
    return tensor


def is_interrupt(error: BaseException) -> bool:
    """Whether an error is Ctrl-C, also where it came while PyTorch asked for the length of a storage, of which ``torch.asarray`` then says
    that it has none."""
    return isinstance(error, KeyboardInterrupt) or "could not determine the shape of object type" in str(error)
