"""Threads that load or compute experts: at the end of the process, and after a fork.

Chats generate in daemon threads, and pages load in them. Python kills these at exit wherever they are. A thread killed inside C++ code (the
kernel's or torch's) ends the process with SIGABRT, so we stop these threads and wait for them first.

A forked child has none of its parent's threads, neither kt-kernel's workers nor OpenMP's. Waiting for them would hang,
so experts can only be used in the process that loaded them.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import threading
import time
import weakref

from .errors import KTKernelError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_callers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_closing = threading.Event()


def register_thread() -> None:
    """Register the current thread as one that loads or computes experts; end it silently if the process is ending.

    Raises:
        SystemExit: The process is ending.
    """
    if _closing.is_set():
        raise SystemExit
    _callers.add(threading.current_thread())


class _Home:
    process: int | None = None


def is_forked() -> bool:
    """Whether this process was forked from one that had loaded experts."""
    return _Home.process not in (None, os.getpid())


def require_own_process() -> None:
    """Bind experts to this process on the first call; refuse any other process later.

    Raises:
        KTKernelError: This process was forked from the one that loaded experts.
    """
    if _Home.process is None:
        _Home.process = os.getpid()
    if is_forked():
        raise KTKernelError(
            f"KT experts of process {_Home.process} were used in process {os.getpid()}, which was forked from it: the threads that "
            "compute them do not survive a fork. Load the model in the process that uses it, and start processes with "
            'multiprocessing.get_context("spawn").'
        )


def die_with_parent() -> None:
    """Have the system kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def join_threads() -> None:
    """Stop the threads that load or compute experts at their next layer, and wait for all of them, 5 seconds at most."""
    _closing.set()
    deadline = time.monotonic() + 5.0
    for thread in list(_callers):
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


atexit.register(join_threads)
