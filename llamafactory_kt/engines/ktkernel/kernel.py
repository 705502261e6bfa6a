"""What all of kt-kernel's kernel objects have in common."""

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
    """What a kernel object is built with and cannot change afterwards."""

    packed: PackedShape
    num_experts_per_tok: int
    rank: int
    """0 for one that never gets LoRA"""
    scaling: float
    max_chunk: int


class KernelObject(ABC):
    """One kernel object of kt-kernel's. It is released at the end of the process, unless it is gone before."""

    wrapper: Any

    def __init__(self, kind: KernelKind):
        self.kind = kind
        self._tasks: dict[tuple[int, ...], Task] = {}

    def _built(self) -> None:
        """To be called last: from now on, there is something to be released."""
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
        """What computes at most ``max_chunk`` tokens: x, out [T, hidden] bf16, index [T, K] int64, scores [T, K] float32, all
        contiguous. It holds their addresses, and is kept: they should be of buffers that are used again and again."""
        count = _counts(self.kind.max_chunk).data_ptr() + 4 * x.shape[0]
        given = count, index.shape[1], index.data_ptr(), scores.data_ptr(), x.data_ptr(), out.data_ptr()
        if (task := self._tasks.get(given)) is None:
            task = self._tasks[given] = self._make_task(given)
        return task


@functools.cache
def _counts(most: int) -> torch.Tensor:
    """int32 0, 1, ... most: a task reads its number of tokens when it runs, which may be after the next was made."""
    return torch.arange(most + 1, dtype=torch.int32, device="cpu")
