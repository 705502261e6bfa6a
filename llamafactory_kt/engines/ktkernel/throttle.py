"""PyTorch's threads made to wait without spinning, for kt-kernel's workers of the idle class."""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache

from ...native.openmp import openmp_libraries


@cache
def throttle() -> None:
    """Let PyTorch's threads wait without spinning, so that idle-class workers get the cores while PyTorch waits for them.

    ``OMP_WAIT_POLICY=PASSIVE`` does this, but libgomp reads it when it is loaded, before any of our code runs. So a thread of our own
    asks for a team of more threads than there are CPUs, which then sleeps.
    """
    done = threading.Event()

    def team() -> None:
        free = ctypes.CDLL(None).free  # free(NULL): a function that does nothing
        for library in openmp_libraries():
            library.GOMP_parallel(free, None, len(os.sched_getaffinity(0)) + 1, 0)
        done.set()
        threading.Event().wait()  # the team ends with its thread

    threading.Thread(target=team, name="openmp-throttle", daemon=True).start()
    done.wait(5)
