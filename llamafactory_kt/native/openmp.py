"""libgomp's thread teams, in which PyTorch and the native kernels compute on the CPU.

Between two kernels a team's threads spin, unless libgomp manages more threads than there are CPUs: then it puts them to sleep almost
at once (``gomp_throttled_spin_count_var`` in its ``team.c``), and each kernel pays for waking them. Every thread that ever called a
kernel owns a team: the one that loaded the model and, in LLaMA-Factory's chats, each thread that generates. Two teams are already too
many, so whoever has done with its kernels ends its team.

Calls libgomp through ctypes: ``omp_pause_resource_all`` (OpenMP 5.0).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from functools import cache
from pathlib import Path

import torch

from ..ground.internals import TESTED, Internal

INTERNAL = Internal("openmp", "torch", TESTED["torch"])
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
    for library in openmp_libraries():
        with contextlib.suppress(AttributeError):  # older than OpenMP 5.0
            library.omp_pause_resource_all(_HARD)


@cache
def pytorch_openmp() -> ctypes.CDLL:
    """The OpenMP that PyTorch computes with, found as the dynamic linker finds it: what the whole process shares (``LD_PRELOAD`` may
    bring Intel's, which knows GNU's calls) comes before what libtorch is linked with.

    Raises:
        OSError: This PyTorch was built in another way.
    """
    process = ctypes.CDLL(None)
    if hasattr(process, "GOMP_parallel"):
        return process
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # and what it is linked with


@cache
def openmp_libraries() -> list[ctypes.CDLL]:
    """Every copy in this process: packages bring their own, and which one PyTorch uses is unknown."""
    paths = re.findall(r"\S*/libgomp[^/\s]*\.so\S*", Path("/proc/self/maps").read_text())
    return [ctypes.CDLL(path) for path in sorted(set(paths))]
