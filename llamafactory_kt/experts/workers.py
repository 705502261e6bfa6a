"""How kt-kernel's worker threads and torch's OpenMP threads share the cores."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from functools import cache
from pathlib import Path

import torch

from .plan import Plan


def arrange(plan: Plan) -> None:
    """Let the threads of this process run as planned, from now on. Worker threads that do not exist yet are not reached."""
    torch.set_num_threads(plan.torch_threads)
    if plan.workers:
        _set_policy(os.SCHED_IDLE if plan.idle_workers else os.SCHED_OTHER)
    if plan.idle_workers:
        _throttle_openmp()
        torch.set_num_threads(plan.torch_threads)


def _set_policy(policy: int) -> None:
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended, or one that may not be raised again
            if (task / "comm").read_text().startswith("numa_") and os.sched_getscheduler(int(task.name)) != policy:
                os.sched_setscheduler(int(task.name), policy, os.sched_param(0))


@cache
def _throttle_openmp() -> None:
    """Let torch's threads wait without spinning, so that idle-class workers get the cores while torch waits for them.

    ``OMP_WAIT_POLICY=PASSIVE`` does this, but libgomp reads it when it is loaded, which is before any of our code. It
    also hardly spins (``gomp_throttled_spin_count_var``) while it manages more threads than there are CPUs; so a
    thread of our own asks it for a team of that many, which does nothing and sleeps.
    """
    libraries = set(re.findall(r"\S*/libgomp[^/\s]*\.so\S*", Path("/proc/self/maps").read_text()))
    done = threading.Event()

    def team() -> None:
        free = ctypes.CDLL(None).free  # free(NULL): a function that does nothing
        for library in libraries:
            ctypes.CDLL(library).GOMP_parallel(free, None, len(os.sched_getaffinity(0)) + 1, 0)
        done.set()
        threading.Event().wait()  # the team ends with its thread

    threading.Thread(target=team, name="openmp-throttle", daemon=True).start()
    done.wait(5)
