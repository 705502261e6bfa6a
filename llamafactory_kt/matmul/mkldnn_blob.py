"""Weights in oneDNN's own layout, those of one size in one block of large pages.

Torch packs each weight into new memory of its own, in pages of 4 KiB, and offers Python no way to say where. Its AOTInductor
does: it stores packed weights in the models that it compiles, and makes tensors of them where they lie, through C functions
that keep their signatures from release to release (``torch/csrc/inductor/aoti_torch/c/shim.h``).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

import torch

from ..ground.paging import in_large_pages
from .libtorch import libtorch

_MEMORY = "_kt_memory"
"""set on a tensor: the block that its numbers lie in"""
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class OneDNNPlaces:
    """Places for so many weights of one size.

    A product with one row reads them at 29 GB/s where it read 26.6 in pages of 4 KiB, and 27 where they began anywhere in a
    page (two cores of a Xeon with AMX).
    """

    def __init__(self, size: tuple[int, int], count: int):
        self._rows = torch.empty(size, dtype=torch.bfloat16, device="cpu")
        self._count = count
        self._block: torch.Tensor | None = None

    def __call__(self, number: int, *rows: torch.Tensor) -> torch.Tensor:
        """Put a weight into a place.

        Args:
            number: of the place, from 0.
            rows: the weight's rows [out, in], in one tensor or several.

        Returns:
            [out, in] as a tensor whose values Python cannot read. An alias (``detach()``) does not keep its memory.
        """
        plain = torch.cat(rows, out=self._rows) if len(rows) > 1 else rows[0]
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(plain, 1)
        if not _can_adopt():
            return packed
        size: int = torch.ops.mkldnn._nbytes(packed)
        if self._block is None:
            step = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            self._block = _from_page_start(self._count, step)
        place = self._block[number, :size]
        source = (ctypes.c_uint8 * size).from_address(torch.ops.mkldnn.data_ptr(packed))
        return _adopt(place.copy_(torch.frombuffer(source, dtype=torch.uint8)), packed)


def as_parameter(weight: torch.Tensor) -> torch.nn.Parameter:
    """The weight as a layer holds it, its memory with it."""
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    vars(parameter).update(vars(weight))
    return parameter


def _from_page_start(count: int, step: int) -> torch.Tensor:
    memory = torch.empty(count * step + mmap.PAGESIZE, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % mmap.PAGESIZE
    return in_large_pages(memory[start : start + count * step].view(count, step))


def _adopt(place: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """A tensor like a packed one, whose numbers are those in place."""
    layout = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
    rows, columns = packed.shape
    pair, handle, torchs = ctypes.c_int64 * 2, ctypes.c_void_p(), libtorch()
    failed = torchs.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(place.data_ptr()), ctypes.c_int64(2), pair(rows, columns), pair(columns, 1), ctypes.c_int64(0),
        torchs.aoti_torch_dtype_bfloat16(), torchs.aoti_torch_device_type_cpu(), 0, ctypes.byref(handle),
        torchs.aoti_torch_layout__mkldnn(), ctypes.c_void_p(layout.data_ptr()), ctypes.c_int64(layout.numel()),
    )  # fmt: skip
    if failed:
        raise RuntimeError("torch could not make a tensor of a packed weight")
    # Its sibling for a single tensor leaves another reference behind, and so never frees one.
    found: torch.Tensor
    (found,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(handle, None, None)])
    vars(found)[_MEMORY] = place
    return found


@cache
def _can_adopt() -> bool:
    """Whether this torch has all that is needed; where not, weights stay where it packs them."""
    names = ("create_tensor_from_blob_v2", "dtype_bfloat16", "device_type_cpu", "layout__mkldnn")
    try:
        all_there = all(hasattr(libtorch(), f"aoti_torch_{name}") for name in names)
    except OSError:
        return False
    operators = ("_nbytes", "data_ptr", "_get_mkldnn_serialized_md")
    return all_there and all(hasattr(torch.ops.mkldnn, name) for name in operators)
