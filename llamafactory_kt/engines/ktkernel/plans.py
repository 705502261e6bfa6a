"""How kt-kernel's worker threads and PyTorch's OpenMP threads share the cores.

kt-kernel's workers spin for 50 ms after their work. Where they and PyTorch's threads together exceed the cores, each starves
the other, and decoding becomes three times slower. Two plans avoid that, and which is faster is measured:

- the cores are divided between workers and PyTorch;
- PyTorch has all cores, and the workers run in the idle scheduling class: they yield to every PyTorch thread, and have the
  cores while PyTorch waits.
"""

from __future__ import annotations

import contextlib
import logging
import os

import torch

from ...ground.errors import KTConfigError
from ...ground.machine import numa_nodes, physical_cores, usable_cores
from ...native import openmp
from ..plan import Plan, PlanRequest
from .cpuinfer import worker_threads
from .throttle import throttle

logger = logging.getLogger(__name__)


def plans(backend: str, request: PlanRequest) -> list[Plan]:
    """The cores divided and, without a GPU, shared with idle-class workers.

    Raises:
        KTConfigError: More sub-pools than NUMA nodes.
    """
    cores, fixed, idle = usable_cores(), request.fixed_torch_threads, request.idle_workers
    workers = choose_workers(request.num_threads, request.pools, request.on_gpu)
    most = workers if request.num_threads else max(workers, min(_room(request.pools), cores - 1))
    divided = Plan(backend, workers, fixed or max(1, cores - workers))
    if fixed is not None or request.on_gpu or most >= cores or idle is False or not openmp.INTERNAL.usable:
        return [divided]  # with as many idle workers as cores, nothing moves for seconds
    shared = Plan(backend, most, cores, idle_workers=True)
    return [shared] if idle else [divided, shared]


def choose_workers(requested: int | None, pools: int, on_gpu: bool) -> int:
    """Worker threads where the cores are divided. Without a GPU, PyTorch computes the attention on the same cores and gets
    half of them. With one, two cores are left: for Python, which queues the GPU's work meanwhile, and for the thread of
    kt-kernel's that hands out tasks.

    Raises:
        KTConfigError: More sub-pools than NUMA nodes.
    """
    cores, nodes = usable_cores(), len(numa_nodes())
    if pools > nodes:
        raise KTConfigError(
            f"kt_threadpool_count: {pools} sub-pools asked for, this process may use {nodes} NUMA node(s). "
            "Remove the key to get one for each."
        )
    room = _room(pools)
    most = max(pools, min(room, cores - 1))
    if requested is None:
        return max(pools, min(room, cores - 2 if on_gpu else cores // 2))
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


def arrange_process(plan: Plan) -> None:
    """Let the threads of this process run as planned from now on. Workers that do not exist yet are not reached."""
    torch.set_num_threads(plan.torch_threads)
    _set_policy(os.SCHED_IDLE if plan.idle_workers else os.SCHED_OTHER)
    if plan.idle_workers:
        throttle()
        torch.set_num_threads(plan.torch_threads)


def _set_policy(policy: int) -> None:
    for thread, _ in worker_threads():
        with contextlib.suppress(OSError):  # a thread that has ended, or one that may not be raised again
            if os.sched_getscheduler(thread) != policy:
                os.sched_setscheduler(thread, policy, os.sched_param(0))
