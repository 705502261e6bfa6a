"""What tells whether two recordings of a layer are the same program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from .recorder import Operation


def description(
    operations: Sequence[Operation], inputs: Sequence[torch.Tensor], mask: torch.Tensor | None
) -> list[Any]:
    """What a recording does, whatever the values and the length of the cache: two are equal if they have the same operators on the same
    constants, wired alike. It keeps the constants, so that no other tensor comes to lie where one did, and no other tensor."""
    names: dict[int, Any] = {_storage(tensor): ("input", number) for number, tensor in enumerate(inputs)}
    if mask is not None:
        names[_storage(mask)] = "mask"
    found: list[Any] = []
    for number, operation in enumerate(operations):
        if operation.function == "append":
            for tensor, name in zip(operation.inputs[2:], ("keys", "values"), strict=True):
                names[_storage(tensor)] = (name, number)
        args = _described((operation.args, operation.kwargs), names)
        for place, tensor in enumerate(operation.outputs):
            names.setdefault(_storage(tensor), ("result", number, place))
        found.append((operation.function, args, _described(operation.result, names)))
    constants = [tensor for operation in operations for tensor in operation.inputs if _storage(tensor) not in names]
    return [_Constants(constants), *found]


class _Constants(list[torch.Tensor]):
    """Equal to any other: the rest of a description has their addresses."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constants)

    __hash__ = None  # type: ignore[assignment]


def _described(tree: Any, names: dict[int, Any]) -> list[Any]:
    leaves, structure = tree_flatten(tree)
    return [str(structure), *(_describe(leaf, names) for leaf in leaves)]


def _describe(leaf: Any, names: dict[int, Any]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        # the cache's layer is another one in each conversation, and calls are made anew
        return leaf if isinstance(leaf, int | float | str | bool | torch.dtype | None) else type(leaf).__name__
    at = _storage(leaf)
    name = names.get(at, at)
    if name == "mask" or (isinstance(name, tuple) and name[0] in ("keys", "values")):
        return name  # of another length for each token
    return name, leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.storage_offset()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
