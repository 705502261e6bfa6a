"""A weight in oneDNN's layout, as layers and their users hold it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}
_CHANGED = "This weight is packed for the CPU and cannot be changed in place ({}); to_dense() gives a copy of it."


class PackedWeight(torch.Tensor):
    """A bfloat16 weight [out, in] in oneDNN's layout.

    The tensor that PyTorch's kernels read in place does not own its memory, and its aliases do not keep that. So nobody gets it but the
    kernels. What a layer holds is this: a tensor without values of its own, which refers to the other one. So does whatever shows it
    (``detach()``, ``data``, a value of ``state_dict()``, an ``nn.Parameter`` ...), and the memory goes with the last of them.

    An operation that reads it gets a plain copy, and so do views, pickling, and other types and devices. None may change it in place.

    Args:
        native: the tensor for the kernels, with an attribute that keeps its memory.
    """

    native: torch.Tensor
    """for calls of kernels, by those who keep this object; never to be aliased"""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, native: torch.Tensor) -> PackedWeight:
        with torch.inference_mode(False):  # an alias that is an inference tensor could be used in that mode only
            weight: PackedWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, native.shape, dtype=native.dtype, layout=native.layout, device=native.device
            )
        torch._C._set_throw_on_mutable_data_ptr(weight)  # what takes addresses would get 0
        weight.native = native
        return weight

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if not isinstance(other, PackedWeight) or other.shape != self.shape:
            raise RuntimeError(_CHANGED.format("data"))
        self.native = other.native

    def to_dense(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[out, in], in memory of its own."""
        return self.native.to_dense(*args, **kwargs)

    def untyped_storage(self) -> NoReturn:
        raise NotImplementedError(
            "This weight is packed for the CPU and has no storage; to_dense() gives a copy of it."
        )

    def __setitem__(self, *_: Any) -> NoReturn:
        raise RuntimeError(_CHANGED.format("setitem"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.to_dense().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Shares the memory, since nobody writes to it."""
        copy = PackedWeight(self.native)
        found = torch.nn.Parameter(copy, False) if isinstance(self, torch.nn.Parameter) else copy
        memo[id(self)] = found
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _ALIASES:
            return PackedWeight(args[0].native)
        given = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            value = args[number] if number < len(args) else given.get(argument.name)
            if argument.is_write and any(isinstance(tensor, PackedWeight) for tensor in tree_leaves(value)):
                raise RuntimeError(_CHANGED.format(func.__name__))
        read = for_kernels if func.namespace == "mkldnn" else PackedWeight.to_dense
        args, given = tree_map_only(PackedWeight, read, (args, given))
        return func(*args, **given)


def for_kernels(weight: torch.Tensor) -> torch.Tensor:
    """What PyTorch's kernels take for a weight, packed or not. The caller keeps ``weight`` meanwhile."""
    return weight.native if isinstance(weight, PackedWeight) else weight
