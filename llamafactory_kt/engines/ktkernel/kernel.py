"""What kt-kernel's kernel objects have in common."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from .methods import PackedShape
from .runtime import live_kernels
from .stream import Task


@dataclass(frozen=True)
class KernelKind:
    """What is fixed when a kernel object is built."""

    packed: PackedShape
    num_experts_per_tok: int
    rank: int
    """of the LoRA it has room for; 0 for none"""
    scaling: float
    max_chunk: int


class KernelObject(ABC):
    """One kernel object. It is released at the end of the process, if not before."""

    wrapper: Any

    def __init__(self, kind: KernelKind):
        self.kind = kind
        self._tasks: dict[tuple[int, ...], Task] = {}

    def _built(self) -> None:
        """Called last when it is built: from now on, there is something to release."""
        live_kernels.add(self)

    @property
    @abstractmethod
    def infer(self) -> Any:
        """kt-kernel's queue of tasks."""

    @abstractmethod
    def _make_task(self, given: tuple[int, ...]) -> Task: ...

    @abstractmethod
    def release(self) -> None:
        """Let go of the kernel object for good."""

    def task(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor) -> Task:
        """The task that computes at most ``max_chunk`` tokens: x, out [T, hidden] bf16, index [T, K] int64, scores [T, K] float32, all
        contiguous. kt-kernel never frees a task's arguments, so tasks are kept, one for each set of buffers; pass buffers that are
        used again and again."""
        count = _counts(self.kind.max_chunk).data_ptr() + 4 * x.shape[0]
        given = count, index.shape[1], index.data_ptr(), scores.data_ptr(), x.data_ptr(), out.data_ptr()
        if (task := self._tasks.get(given)) is None:
            task = self._tasks[given] = self._make_task(given)
        return task


@functools.cache
def _counts(most: int) -> torch.Tensor:
    """int32 0, 1, ... most: a task reads its number of tokens only when it runs, maybe after the next one was made."""
    return torch.arange(most + 1, dtype=torch.int32, device="cpu")
