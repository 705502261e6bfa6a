"""libgomp's thread teams, in which PyTorch computes its CPU kernels.

Between two kernels a team's threads spin, unless libgomp manages more threads than there are CPUs: then it puts them to sleep almost
at once (``gomp_throttled_spin_count_var`` in its ``team.c``), and each kernel pays for waking them. Every thread that ever called a
kernel owns a team: the one that loaded the model and, in LLaMA-Factory's chats, each thread that generates. Two teams are already too
many, so whoever needs threads borrows the team's.

Calls libgomp through ctypes: ``omp_pause_resource_all`` (OpenMP 5.0) and ``GOMP_parallel`` (libgomp's binary interface for compilers).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from ..ground.internals import TESTED, Internal
from .libtorch import libtorch

INTERNAL = Internal("openmp", "torch", TESTED["torch"])
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_HARD = 2
"""omp_pause_hard (OpenMP 5.0, section 3.2.44)"""


_forked = threading.Event()
"""set in a forked process: libgomp would wait for ever for threads that only the parent has"""
os.register_at_fork(after_in_child=_forked.set)


def release_team() -> None:
    """End the calling thread's team. Its next kernel starts a new one, which is cheap; a team left spinning takes the cores of the
    thread that generates."""
    if _forked.is_set() or not INTERNAL.usable:
        return
    for library in _libraries():
        with contextlib.suppress(AttributeError):  # older than OpenMP 5.0
            library.omp_pause_resource_all(_HARD)


def in_team(work: Callable[[], None], threads: int) -> None:
    """Call ``work`` in ``threads`` threads of the calling thread's team, itself among them, and wait for all. Inside, each thread
    computes the kernels it calls alone, as in any parallel region of OpenMP.

    Where libgomp is out of reach, the calling thread does all the work.

    Raises:
        BaseException: The first that a thread raised.
    """
    raised: list[BaseException] = []

    def region(_: int | None) -> None:
        try:
            with torch.inference_mode():
                work()
        except BaseException as error:  # which C code cannot pass on
            raised.append(error)

    parallel = getattr(_pytorch_openmp(), "GOMP_parallel", None) if INTERNAL.usable else None
    if parallel is None:
        region(None)
    else:
        parallel(_REGION(region), None, threads, 0)
    if raised:
        raise raised[0]


@cache
def throttle() -> None:
    """Let PyTorch's threads wait without spinning, so that idle-class workers get the cores while PyTorch waits for them.

    ``OMP_WAIT_POLICY=PASSIVE`` does this, but libgomp reads it when it is loaded, before any of our code runs. So a thread of our own
    asks for a team of more threads than there are CPUs, which then sleeps.
    """
    done = threading.Event()

    def team() -> None:
        free = ctypes.CDLL(None).free  # free(NULL): a function that does nothing
        for library in _libraries():
            library.GOMP_parallel(free, None, len(os.sched_getaffinity(0)) + 1, 0)
        done.set()
        threading.Event().wait()  # the team ends with its thread

    threading.Thread(target=team, name="openmp-throttle", daemon=True).start()
    done.wait(5)


@cache
def _pytorch_openmp() -> ctypes.CDLL:
    """The OpenMP that PyTorch computes with, found as the dynamic linker finds it: what the whole process shares (``LD_PRELOAD`` may
    bring Intel's, which knows GNU's calls) comes before what libtorch is linked with."""
    process = ctypes.CDLL(None)
    if hasattr(process, "GOMP_parallel"):
        return process
    return libtorch()


@cache
def _libraries() -> list[ctypes.CDLL]:
    """Every copy in this process: packages bring their own, and which one PyTorch uses is unknown."""
    paths = re.findall(r"\S*/libgomp[^/\s]*\.so\S*", Path("/proc/self/maps").read_text())
    return [ctypes.CDLL(path) for path in sorted(set(paths))]
