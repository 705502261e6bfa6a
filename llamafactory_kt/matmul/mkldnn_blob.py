"""Weights in oneDNN's own layout, all of one size in one block of huge pages.

PyTorch packs each weight into newly allocated memory in pages of 4 KiB, and Python cannot say where. AOTInductor can: it stores packed
weights in the models that it compiles, and makes tensors of them in place, through C functions that keep their signatures from release
to release (``torch/csrc/inductor/aoti_torch/c/shim.h``).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

import torch

from ..ground.internals import TESTED, Internal
from ..ground.paging import in_huge_pages
from .libtorch import libtorch
from .mkldnn_ops import pack
from .packed_weight import PackedWeight

INTERNAL = Internal("mkldnn-blob", "torch", TESTED["torch"])
_MEMORY = "_kt_memory"
"""attribute of a tensor: the block that holds its values"""
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class OneDNNPlaces:
    """Places for ``count`` weights of one size, each from the start of a page: one row times such a weight reads memory faster
    than from pages of 4 KiB, or from anywhere in a page."""

    def __init__(self, size: tuple[int, int], count: int):
        self._rows = torch.empty(size, dtype=torch.bfloat16, device="cpu")
        self._count = count
        self._block: torch.Tensor | None = None

    def __call__(self, number: int, *rows: torch.Tensor) -> torch.Tensor:
        """Put a weight into a place.

        Args:
            number: index of the place.
            rows: the weight's rows [out, in], in one tensor or several.

        Returns:
            [out, in], a :class:`~.packed_weight.PackedWeight`; where this PyTorch cannot place it, PyTorch's own packed tensor.
        """
        plain = torch.cat(rows, out=self._rows) if len(rows) > 1 else rows[0]
        packed = pack(plain)
        if not _can_adopt():
            return packed
        size: int = torch.ops.mkldnn._nbytes(packed)
        if self._block is None:
            step = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            self._block = _from_page_start(self._count, step)
        place = self._block[number, :size]
        source = (ctypes.c_uint8 * size).from_address(torch.ops.mkldnn.data_ptr(packed))
        return PackedWeight(_adopt(place.copy_(torch.frombuffer(source, dtype=torch.uint8)), packed))


def as_parameter(weight: torch.Tensor) -> torch.nn.Parameter:
    """The weight as a layer holds it."""
    return torch.nn.Parameter(weight, requires_grad=False)


def _from_page_start(count: int, step: int) -> torch.Tensor:
    memory = torch.empty(count * step + mmap.PAGESIZE, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % mmap.PAGESIZE
    return in_huge_pages(memory[start : start + count * step].view(count, step))


def _adopt(place: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """A tensor like ``packed`` whose values are those in ``place``. It keeps that, but its aliases do not."""
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
    # The function for a single tensor leaks a reference.
    found: torch.Tensor
    (found,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(handle, None, None)])
    vars(found)[_MEMORY] = place
    return found


@cache
def _can_adopt() -> bool:
    """Whether this PyTorch has all that is needed; otherwise weights stay where it packs them."""
    if not INTERNAL.usable:
        return False
    names = ("create_tensor_from_blob_v2", "dtype_bfloat16", "device_type_cpu", "layout__mkldnn")
    try:
        all_there = all(hasattr(libtorch(), f"aoti_torch_{name}") for name in names)
    except OSError:
        return False
    operators = ("_nbytes", "data_ptr", "_get_mkldnn_serialized_md")
    all_there &= all(hasattr(torch.ops.mkldnn, name) for name in operators)
    return all_there and hasattr(torch._C, "_set_throw_on_mutable_data_ptr")
