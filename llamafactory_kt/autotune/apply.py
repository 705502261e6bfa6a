"""How kt-kernel's worker threads and torch's OpenMP threads share the cores."""

from __future__ import annotations

import contextlib
import os

import torch

from ..engines.ktkernel.cpuinfer import worker_threads
from ..matmul import openmp
from .plan import Plan


def arrange(plan: Plan) -> None:
    """Let the threads of this process run as planned, from now on. Worker threads that do not exist yet are not reached."""
    torch.set_num_threads(plan.torch_threads)
    if plan.workers:
        _set_policy(os.SCHED_IDLE if plan.idle_workers else os.SCHED_OTHER)
    if plan.idle_workers:
        openmp.throttle()
        torch.set_num_threads(plan.torch_threads)


def _set_policy(policy: int) -> None:
    for thread, _ in worker_threads():
        with contextlib.suppress(OSError):  # a thread that has ended, or one that may not be raised again
            if os.sched_getscheduler(thread) != policy:
                os.sched_setscheduler(thread, policy, os.sched_param(0))
