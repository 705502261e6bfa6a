"""Writing tensor files one tensor at a time, so that no more than one layer is in memory: safetensors, and torch.save's.

safetensors (huggingface/safetensors, README): eight bytes with the header's length, little-endian; a JSON header that
gives each tensor's dtype, shape and byte range, and may end in blanks; the tensors' bytes. torch.save (``_save`` in
``torch/serialization.py``): a zip archive with the pickled structure and one record a tensor.
"""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from .tensor_files import DTYPES

_ENTRY = 200
"""bytes of room for one tensor's dtype, shape and byte range in the header"""


def write_safetensors(
    path: Path, names: Collection[str], tensors: Iterable[tuple[str, torch.Tensor]], metadata: dict[str, str] | None
) -> None:
    """Write the tensors as they come. Their names are known before, so that the header finds its room at the start.

    Raises:
        ValueError: The tensors that came are not the ones that were named.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    room = len(json.dumps(header)) + sum(len(json.dumps(name)) + _ENTRY for name in names)
    room += -room % 8
    offset = 0
    with path.open("wb") as file:
        file.seek(8 + room)
        for name, tensor in tensors:
            end = offset + tensor.nbytes
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
            file.write(_bytes(tensor))
        if header.keys() - {"__metadata__"} != set(names):
            raise ValueError(f"{path}: {len(names)} tensors were announced, {len(header)} came")
        file.seek(0)
        file.write(room.to_bytes(8, "little"))
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(room))


def write_moe_lora_file(
    path: Path, metadata: dict[str, Any], layers: Iterator[tuple[str, dict[str, torch.Tensor]]]
) -> None:
    """What ``torch.save({"metadata": metadata, group: {name: tensor}}, path)`` writes, group by group."""
    writer = torch._C.PyTorchFileWriter(str(path))
    content: dict[str, Any] = {"metadata": metadata}
    records = 0
    for group, tensors in layers:
        content[group] = {}
        for name, tensor in tensors.items():
            storage = tensor.contiguous().untyped_storage()
            if storage.nbytes() != tensor.nbytes:
                storage = tensor.clone(memory_format=torch.contiguous_format).untyped_storage()
            writer.write_record(f"data/{records}", storage, tensor.nbytes)  # type: ignore[arg-type]
            content[group][name] = _Tensor(str(records), tensor)
            records += 1
    structure = BytesIO()
    _Pickler(structure, protocol=2).dump(content)
    writer.write_record("data.pkl", structure.getvalue(), structure.tell())
    writer.write_record("byteorder", b"little", 6)
    writer.write_end_of_file()


_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
}


class _Storage:
    """A record of the archive."""

    def __init__(self, key: str, tensor: torch.Tensor):
        self.identity = ("storage", _STORAGES[tensor.dtype], key, "cpu", tensor.numel())


class _Tensor:
    """Pickled as the tensor whose bytes are in a record."""

    def __init__(self, key: str, tensor: torch.Tensor):
        stride = torch.empty(tensor.shape, device="meta").stride()
        self.arguments: tuple[Any, ...] = _Storage(key, tensor), 0, tuple(tensor.shape), stride, False, OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, _Storage) else None


def _bytes(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return data
