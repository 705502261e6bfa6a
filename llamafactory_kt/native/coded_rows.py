"""Rows of a cache as codes of eight bits, for half the memory.

Symmetric: a value is its code times the row's scale, which is the largest magnitude of the row divided by 127. A row [d] is kept as int32
words [ceil(d / 4) + 1]: four codes each, and in the last word the scale's float32. So one tensor has all of a row, and what picks, moves or
drops rows need not know what they are.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .library import DTYPES, STEPS, Step, kernels, library
from .recording import active

STORED = torch.int32
_SAME = torch.ops.aten.detach.default, torch.ops.aten.alias.default


def can_encode(states: torch.Tensor) -> bool:
    """Whether there are values that :func:`encode` reads; gradients do not come through it."""
    known = states.device.type == "cpu" and states.dtype in DTYPES and states.dim() == 4 and states.numel() > 0
    return known and not (torch.is_grad_enabled() and states.requires_grad) and not isinstance(library(), str)


def row_nbytes(width: int) -> int:
    """Bytes of a row [d]."""
    return (-(-width // 4) + 1) * STORED.itemsize


def encode(states: torch.Tensor) -> torch.Tensor:
    """Values [B, heads, n, d] of any dtype of the kernels -> int32 [B, heads, n, ceil(d / 4) + 1]. A row with NaN or infinities is all NaN
    when it is decoded."""
    states = states if states.stride(-1) == 1 else states.contiguous()
    rows = torch.empty(*states.shape[:-1], row_nbytes(states.shape[-1]) // STORED.itemsize, dtype=STORED)
    step = Step(op=STEPS["encode"], out=rows.data_ptr(), a=states.data_ptr())
    point(step, states, rows)
    kernels().kt_run(byref(step), 1, None, torch.get_num_threads(), None)
    if active.recorder is not None:
        active.recorder.note("encode", None, (states,), rows)
    return rows


def point(step: Step, states: torch.Tensor, rows: torch.Tensor) -> None:
    """Give a step the shapes of what it encodes; its addresses are set already."""
    step.sizes[:] = states.shape
    step.strides[0][:], step.strides[1][:] = rows.stride(), states.stride()
    step.dtypes[1] = DTYPES[states.dtype]


def decode(rows: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, heads, n, width]; the inverse of :func:`encode`, but for rounding."""
    codes = rows[..., :-1].contiguous().view(torch.int8)[..., :width]
    return (codes * rows[..., -1:].contiguous().view(torch.float32)).to(dtype)


class CodedRows(torch.Tensor):
    """Stands in for keys or values [B, heads, n, d] of some floating dtype on the CPU.

    The kernels of attention read the codes. Every other operator gets the values decoded, whenever it asks. It cannot be changed in place.
    """

    rows: torch.Tensor

    @staticmethod
    def __new__(cls, rows: torch.Tensor, width: int, dtype: torch.dtype) -> CodedRows:
        make: Any = torch.Tensor._make_wrapper_subclass
        tensor: CodedRows = make(cls, (*rows.shape[:-1], width), dtype=dtype, device="cpu")
        tensor.rows = rows
        return tensor

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _SAME:
            return cls(args[0].rows, args[0].shape[-1], args[0].dtype)
        return func(*tree_map(decoded, args), **tree_map(decoded, kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CodedRows({tuple(self.shape)}, {self.dtype})"


def decoded(value: Any) -> Any:
    """The values of coded rows; all else as it is."""
    return decode(value.rows, value.shape[-1], value.dtype) if isinstance(value, CodedRows) else value
