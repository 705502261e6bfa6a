"""A weight that is kept as codes, and stays a tensor that Python can read."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from .packed import PackedWeight

_SAME = torch.ops.aten.detach.default, torch.ops.aten.alias.default


class QuantizedTensor(torch.Tensor):
    """Stands in for a weight [out, in] of some floating dtype on the CPU.

    The native kernels read its codes. Every other operator gets the weight dequantized, whenever it asks: slow, but right. It cannot be
    changed in place.
    """

    packed: PackedWeight

    @staticmethod
    def __new__(cls, packed: PackedWeight, dtype: torch.dtype) -> QuantizedTensor:
        make: Any = torch.Tensor._make_wrapper_subclass
        tensor: QuantizedTensor = make(cls, packed.shape, dtype=dtype, device="cpu")
        tensor.packed = packed
        return tensor

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _SAME:
            return cls(args[0].packed, args[0].dtype)
        changed = [
            given
            for given, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if any(isinstance(given, cls) for given in changed):
            raise RuntimeError(
                "This weight is quantized (kt_dense) and cannot be changed in place. Load with kt_dense: same."
            )
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedTensor({self.packed.packing.kind}, {tuple(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        """Of the codes."""
        return self.packed.codes.data_ptr()

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Memory of codes and scales."""
        return self.packed.nbytes


def _plain(value: Any) -> Any:
    return value.packed.dequantize(value.dtype) if isinstance(value, QuantizedTensor) else value
