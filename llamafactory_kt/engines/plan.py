"""Plans: an engine with the threads it runs with."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..ground.machine import usable_cores


@dataclass(frozen=True)
class Plan:
    """One engine and its threads."""

    backend: str
    """name of the engine"""
    workers: int
    """worker threads of the engine's own; 0 where PyTorch's threads compute the experts"""
    torch_threads: int
    idle_workers: bool = False
    """workers run in the idle scheduling class"""

    def __str__(self) -> str:
        workers = f"{self.workers} {'idle-class ' if self.idle_workers else ''}worker(s) and " if self.workers else ""
        return f"{self.backend} with {workers}{self.torch_threads} torch thread(s)"


@dataclass(frozen=True)
class PlanRequest:
    """What the plans must fit."""

    on_gpu: bool = False
    """a GPU computes all but the experts, which then have the CPU to themselves"""
    pools: int = 1
    """NUMA sub-pools"""
    num_threads: int | None = None
    """workers that were asked for"""
    idle_workers: bool | None = None
    """whether workers run in the idle scheduling class; None allows both"""
    shared: bool = False
    """a GPU computes some of the experts"""

    @property
    def fixed_torch_threads(self) -> int | None:
        """PyTorch's threads where ``OMP_NUM_THREADS`` sets them."""
        return torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else None

    @property
    def all_torch_threads(self) -> int:
        """PyTorch's threads where they have the CPU to themselves."""
        return self.fixed_torch_threads or usable_cores()
