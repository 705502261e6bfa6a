"""libgomp's teams: the threads that torch's products wait with between two products.

They spin, so that the next product finds them awake, unless libgomp manages more threads than there are CPUs; then it
puts them to sleep almost at once (``gomp_throttled_spin_count_var`` in its ``team.c``), and each product pays for
waking them. Every thread that ever computed owns a team: the one that loaded the model, and in LLaMA-Factory's chats
each thread that generates. Two teams are already too many. So whoever wants threads of Python's borrows those of the team.
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

from .libtorch import libtorch

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_HARD = 2
"""omp_pause_hard (OpenMP 5.0, section 3.2.44)"""


class _Team:
    parents = False
    """whether this process was forked: libgomp would wait for ever for threads that only the parent has"""

    @classmethod
    def is_parents(cls) -> None:
        cls.parents = True


os.register_at_fork(after_in_child=_Team.is_parents)


def release_team() -> None:
    """End the threads that wait for the calling thread's next product; that product starts new ones, in 0.1 ms.

    On two cores, a prompt of 128 tokens took a quarter longer in a chat whose loading thread kept its team.
    """
    if _Team.parents:
        return
    for library in _libraries():
        with contextlib.suppress(AttributeError):  # older than OpenMP 5.0
            library.omp_pause_resource_all(_HARD)


def in_team(work: Callable[[], None], threads: int) -> None:
    """Call ``work`` in so many threads of the calling thread's team, itself among them, and wait for all.

    Torch's products inside it are computed by the thread that calls them, as in any parallel region of OpenMP.

    Raises:
        BaseException: What the first of them raised.
    """
    raised: list[BaseException] = []

    def region(_: int | None) -> None:
        try:
            with torch.inference_mode():
                work()
        except BaseException as error:  # which would end in C
            raised.append(error)

    try:
        parallel = _torchs().GOMP_parallel
    except AttributeError:  # a torch with another OpenMP
        region(None)
    else:
        parallel(_REGION(region), None, threads, 0)
    if raised:
        raise raised[0]


@cache
def throttle() -> None:
    """Let torch's threads wait without spinning, so that idle-class workers get the cores while torch waits for them.

    ``OMP_WAIT_POLICY=PASSIVE`` does this, but libgomp reads it when it is loaded, which is before any of our code. So a
    thread of our own asks for a team of more threads than there are CPUs, which does nothing and sleeps.
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
def _torchs() -> ctypes.CDLL:
    """The OpenMP that torch computes with, found as the dynamic linker does: what the whole process shares (``LD_PRELOAD`` may
    bring Intel's, which knows GNU's calls) comes before what torch's library of products is linked with."""
    process = ctypes.CDLL(None)
    if hasattr(process, "GOMP_parallel"):
        return process
    return libtorch()


@cache
def _libraries() -> list[ctypes.CDLL]:
    """Every copy in this process; packages bring their own, and which of them torch uses is not said."""
    paths = re.findall(r"\S*/libgomp[^/\s]*\.so\S*", Path("/proc/self/maps").read_text())
    return [ctypes.CDLL(path) for path in sorted(set(paths))]
