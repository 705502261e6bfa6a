"""Which engine computes the experts here, with how many threads, and how those get along with torch's.

Threads decide everything: kt-kernel's workers spin for 50 ms after their work, and where they and torch's threads
together exceed the cores, each starves the other (decoding becomes three times slower). There are three ways out, and
which is best is measured (:mod:`.calibration`):

- the cores are divided between workers and torch;
- torch has all cores, and the workers run in the idle scheduling class, in which they lose every contest against
  torch and still have the cores while torch waits (:mod:`.workers`);
- no workers: torch's threads compute the experts too (:mod:`.onednn_engine`).
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..engines.ktkernel.methods import METHODS, Method
from ..engines.ktkernel.runtime import kernel_problem, require_kernel
from ..engines.registry import PACKED, canonical_backend
from ..ground.errors import KTConfigError
from ..ground.machine import numa_nodes, physical_cores, usable_cores
from ..matmul.linear import onednn_problem

if TYPE_CHECKING:
    from ..model.config import KTExpertsConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What was chosen, before or after measuring."""

    backend: str
    """one of :data:`~llamafactory_kt.engines.registry.BACKENDS` but ``auto``"""
    workers: int
    """kt-kernel's worker threads, 0 for other engines"""
    torch_threads: int
    idle_workers: bool = False
    """workers run in the idle scheduling class"""

    @property
    def method(self) -> Method | None:
        """How kt-kernel packs the weights; None for torch's engines."""
        return METHODS.get(self.backend)

    def __str__(self) -> str:
        workers = f"{self.workers} {'idle-class ' if self.idle_workers else ''}worker(s) and " if self.workers else ""
        return f"{self.backend} with {workers}{self.torch_threads} torch thread(s)"


def candidates(config: KTExpertsConfig, on_gpu: bool) -> list[Plan]:
    """The plans that fit the configuration and this machine; the first is taken where nothing is measured.

    ``OMP_NUM_THREADS`` fixes torch's threads. A number of workers that is asked for is taken as it is, and means
    kt-kernel where the backend is ``auto``. Where the adapter is to be merged into the weights, ``auto`` may be a kernel that
    computes no LoRA.

    Raises:
        KTConfigError: Unknown backend, ``weight_path`` missing or useless, or threads and sub-pools that do not fit.
        KTKernelError: The kernel that was asked for cannot run here.
    """
    backend, num_threads = canonical_backend(config.backend), config.num_threads
    if config.weight_path and backend not in PACKED:
        raise KTConfigError(f"weight_path is for {' and '.join(PACKED)}, not for backend {backend}.")
    if backend == "AMXINT8" and not config.weight_path:
        raise KTConfigError("AMXINT8 needs weight_path: a directory that llamafactory-kt quantize made.")
    kernel = _kernel(backend, config.merge_adapter)
    workers = choose_threads(num_threads if kernel else None, config.pools, on_gpu)
    fixed = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else None
    idle = False if on_gpu else config.idle_workers
    most = workers if num_threads else max(workers, min(_room(config.pools), usable_cores() - 1))
    plans = _with_workers(kernel, workers, most, fixed, idle) if kernel else []
    if kernel and (kernel == backend or num_threads):
        return plans
    if num_threads:
        logger.warning("kt_num_threads: %d does nothing here: torch's threads compute the experts.", num_threads)
    problem, alone = onednn_problem(), fixed or usable_cores()
    if backend == "oneDNN" and problem:
        raise KTConfigError(f"kt_backend: oneDNN cannot run here: {problem}. Use kt_backend: torch.")
    if backend != "auto":
        return [Plan(backend, 0, alone)]
    if problem is None:
        plans.append(Plan("oneDNN", 0, alone))
    elif not plans:
        logger.warning("kt_backend: auto falls back to plain torch, which is slow: %s; %s.", kernel_problem(), problem)
        plans.append(Plan("torch", 0, alone))
    return plans


def _kernel(backend: str, merged: bool) -> str | None:
    """Which of kt-kernel's kernels may compute; None where none does."""
    if backend in METHODS:
        require_kernel(backend)
        return backend
    names = ("AMXBF16", "AVX2BF16") if merged else ("AMXBF16",)
    return next((name for name in names if kernel_problem(name) is None), None) if backend == "auto" else None


def _with_workers(backend: str, workers: int, most: int, fixed: int | None, idle_workers: bool | None) -> list[Plan]:
    """Plans for kt-kernel: the cores divided, and shared with workers that give way.

    Args:
        most: workers of the latter.
        fixed: torch's threads where they are not ours to choose.
    """
    cores = usable_cores()
    divided = Plan(backend, workers, fixed or max(1, cores - workers))
    if fixed is not None or most >= cores or idle_workers is False:
        return [divided]  # with as many idle workers as cores, nothing moves for seconds
    shared = Plan(backend, most, cores, idle_workers=True)
    return [shared] if idle_workers else [divided, shared]


def choose_threads(requested: int | None, pools: int, on_gpu: bool) -> int:
    """Worker threads where the cores are divided. Without a GPU, torch computes the attention on the same cores and gets
    half of them. With one, two are left, for Python, which queues the GPU's work meanwhile, and for kt-kernel's thread that
    hands out the tasks: on 16 cores beside an H100, a prompt took half as long again with 15 workers as with 13 or 14.

    Raises:
        KTConfigError: Fewer workers than sub-pools, or more sub-pools than NUMA nodes.
    """
    cores, nodes = usable_cores(), len(numa_nodes())
    if pools > nodes:
        raise KTConfigError(
            f"kt_threadpool_count: {pools} sub-pools asked for, this process may use {nodes} NUMA node(s)."
        )
    room = _room(pools)
    most = max(pools, min(room, cores - 1))
    if requested is None:
        return max(pools, min(room, cores - 2 if on_gpu else cores // 2))
    if requested < pools:
        raise KTConfigError(
            f"kt_num_threads: {requested} is fewer than kt_threadpool_count: {pools}; give each pool one."
        )
    if requested > room:
        logger.warning(
            "kt_num_threads: %d is more than the %d cores that this process may use on %d of %d NUMA node(s); using %d.",
            requested, room, pools, nodes, most,
        )  # fmt: skip
        return most
    return requested


def _room(pools: int) -> int:
    """Cores for workers. Those of a sub-pool all run on its NUMA node, and sub-pools are of equal size."""
    nodes = list(numa_nodes().values())
    return min(usable_cores(), pools * min(map(physical_cores, nodes[:pools])))
