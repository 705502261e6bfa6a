"""Writing the file of ``torch.save`` one group of tensors at a time, so that no more than one layer is in memory.

The format (``_save`` in ``torch/serialization.py``): a zip archive with the pickled structure and one record a tensor. PyTorch has
no public way to write it piece by piece; this file uses ``torch._C.PyTorchFileWriter`` and ``torch._utils._rebuild_tensor_v2``.
"""

from __future__ import annotations

import contextlib
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from ..internals import TESTED, Internal

INTERNAL = Internal("torch-archive", "torch", TESTED["torch"])
_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
}


def write_torch_archive(
    path: Path, metadata: dict[str, Any], groups: Iterator[tuple[str, dict[str, torch.Tensor]]]
) -> None:
    """Write what ``torch.save({"metadata": metadata, group: {name: tensor}}, path)`` writes. With other versions of PyTorch, that is
    what is called, with all tensors in memory."""
    if not INTERNAL.usable:
        torch.save({"metadata": metadata, **dict(groups)}, path)
        return
    writer = torch._C.PyTorchFileWriter(str(path))
    try:
        _write(writer, metadata, groups)
    except BaseException:
        with contextlib.suppress(RuntimeError):
            writer.write_end_of_file()  # its destructor would call it, and end the process if that fails
        raise
    writer.write_end_of_file()


def _write(writer: Any, metadata: dict[str, Any], groups: Iterator[tuple[str, dict[str, torch.Tensor]]]) -> None:
    content: dict[str, Any] = {"metadata": metadata}
    records = 0
    for group, tensors in groups:
        content[group] = {}
        for name, tensor in tensors.items():
            storage = tensor.contiguous().untyped_storage()
            if storage.nbytes() != tensor.nbytes:
                storage = tensor.clone(memory_format=torch.contiguous_format).untyped_storage()
            writer.write_record(f"data/{records}", storage, tensor.nbytes)
            content[group][name] = _Tensor(str(records), tensor)
            records += 1
    structure = BytesIO()
    _Pickler(structure, protocol=2).dump(content)
    writer.write_record("data.pkl", structure.getvalue(), structure.tell())
    writer.write_record("byteorder", b"little", 6)


class _Storage:
    """Pickled as a reference to a record of the archive."""

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
