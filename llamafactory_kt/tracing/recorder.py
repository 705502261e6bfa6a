"""Recording what a module's forward computes: PyTorch's operators, and the kernels' calls between them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..native.recording import active


@dataclass(frozen=True)
class Operation:
    """One operator of PyTorch's, or one call of the kernels."""

    function: Any
    """an operator (``torch._ops.OpOverload``), or a call's kind"""
    args: tuple[Any, ...]
    """of a call: itself, then its tensors"""
    kwargs: dict[str, Any]
    result: Any

    @property
    def inputs(self) -> list[torch.Tensor]:
        return _tensors((self.args, self.kwargs))

    @property
    def outputs(self) -> list[torch.Tensor]:
        return _tensors(self.result)

    @property
    def written(self) -> list[torch.Tensor]:
        """The inputs that an operator changes in place."""
        if isinstance(self.function, str):
            return []
        given = zip(self.function._schema.arguments, self.args, strict=False)
        changed = [value for argument, value in given if argument.is_write]
        changed += [
            self.kwargs[a.name] for a in self.function._schema.arguments if a.is_write and a.name in self.kwargs
        ]
        return _tensors(changed)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Recording(TorchDispatchMode):
    """What is computed in its context. It keeps every tensor, so that no two have the same address."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if not self._paused:
            with self:
                found = func.decompose(*args, **given)  # of operators that are made of others
            if found is not NotImplemented:
                return found
        result = func(*args, **given)
        if not self._paused:
            self.operations.append(Operation(func, args, given, result))
        return result

    def note(self, kind: str, call: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor | None) -> None:
        """See :class:`~..native.recording.Recorder`."""
        self.operations.append(Operation(kind, (call, *inputs), {}, output))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """See :class:`~..native.recording.Recorder`."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


_one_at_a_time = threading.Lock()
"""PyTorch notes for the whole process whether a dispatch mode is on: of two that end in turn, the second would put back the first"""


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Record what this thread computes, in inference mode if it is: a state that was made in it can be changed in it alone."""
    with _one_at_a_time:
        recording = active.recorder = Recording()
        try:
            with torch.no_grad(), recording:
                yield recording
        finally:
            active.recorder = None
