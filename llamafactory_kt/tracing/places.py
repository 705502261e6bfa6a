"""Where the tensors of a recording lie when it is run as a program."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .recorder import Operation

_ALIGNMENT = 64


class CannotLower(Exception):
    """A recording does something that a program cannot."""


class Places:
    """Moves what was computed, and what a layer is called with, into one arena; constants (weights, and what is made of them alone) stay.

    Args:
        inputs: what the layer is called with, but for the mask.
        arena: uint8 memory.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        inputs: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        arena: torch.Tensor,
    ):
        self._arena, self._used = arena, 0
        self._offsets: dict[int, int] = {}
        """address of a storage -> offset in the arena"""
        self._read: set[int] = set()
        self._kept: list[torch.Tensor] = []
        """constants"""
        self._outside = {_storage(mask)} if mask is not None else set()
        """storages that lie elsewhere in each run: the cache's and the mask's"""
        self._constants: set[int] = set()
        for tensor in inputs:
            if not tensor.is_contiguous() or _storage(tensor) in self._offsets:
                raise CannotLower("inputs that are strided, or share memory")
            self._offsets[_storage(tensor)] = self._take(tensor.nbytes) - (tensor.data_ptr() - _storage(tensor))
        changed = {_storage(tensor) for operation in operations for tensor in operation.written}
        for operation in operations:
            self._place(operation, changed)

    def _place(self, operation: Operation, changed: set[int]) -> None:
        if operation.function == "append":
            self._outside.update(map(_storage, operation.inputs[2:]))
        for tensor in operation.inputs:
            at = _storage(tensor)
            self._read.add(at)
            if at not in self._offsets and at not in self._outside:
                self._constants.add(at)
                self._kept.append(tensor)
        if any(_storage(tensor) not in self._offsets for tensor in operation.written):
            raise CannotLower(f"{operation.function} changes what is not the layer's own")
        of_constants = not isinstance(operation.function, str) and all(
            _storage(t) in self._constants for t in operation.inputs
        )
        for tensor in operation.outputs:
            at = _storage(tensor)
            if at in self._offsets or at in self._constants or at in self._outside:
                continue
            if of_constants and at not in changed and not _is_empty(operation):
                self._constants.add(at)
                self._kept.append(tensor)
            else:
                self._offsets[at] = self._take(tensor.untyped_storage().nbytes())

    def _take(self, nbytes: int) -> int:
        start, self._used = self._used, self._used + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._used > self._arena.nbytes:
            raise CannotLower("more memory than the arena has")
        return start

    def address(self, tensor: torch.Tensor) -> int:
        """Of the tensor's first element."""
        at = _storage(tensor)
        if at in self._offsets:
            return self._arena.data_ptr() + self._offsets[at] + tensor.data_ptr() - at
        return tensor.data_ptr()

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, where it lies in the program."""
        if _storage(tensor) not in self._offsets or not tensor.numel():
            return tensor
        offset = (self.address(tensor) - self._arena.data_ptr()) // tensor.itemsize
        start = self._arena.storage_offset() // tensor.itemsize
        return torch.empty(0, dtype=tensor.dtype).set_(
            self._arena.untyped_storage(),
            start + offset,
            tensor.shape,
            tensor.stride(),  # type: ignore[arg-type]
        )

    def is_read(self, tensor: torch.Tensor) -> bool:
        """Whether any operation reads it, or a view of it."""
        return _storage(tensor) in self._read

    def is_constant(self, tensor: torch.Tensor) -> bool:
        """Whether it is the same in every run."""
        return _storage(tensor) in self._constants

    def is_computed(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in the program's memory."""
        return _storage(tensor) in self._offsets

    def is_outside(self, tensor: torch.Tensor) -> bool:
        """Whether it is of the cache or the mask."""
        return _storage(tensor) in self._outside

    def is_done(self, operation: Operation) -> bool:
        """Whether a run need not repeat an operation: it makes views, memory without values, or constants."""
        if operation.written:
            return False
        sources = set(map(_storage, operation.inputs))
        return _is_empty(operation) or all(_storage(t) in sources or self.is_constant(t) for t in operation.outputs)


def _is_empty(operation: Operation) -> bool:
    return str(operation.function).startswith(("aten.empty", "aten.new_empty"))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
