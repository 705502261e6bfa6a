"""Threads that compute experts, the end of the process, and forks of it.

Chats generate in daemon threads. Python kills those at exit wherever they are, and one that is killed inside C++ code
(the kernel's or torch's) takes the process down with SIGABRT; so they are stopped here and waited for before that.

A forked child has none of its parent's threads, neither kt-kernel's workers nor OpenMP's, and whoever waits for them
there waits for ever; so whoever has loaded experts keeps them to itself.
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


def enter() -> None:
    """Make the current thread known; at the end of the process, end it without a word.

    Raises:
        SystemExit: The process is ending.
    """
    if _closing.is_set():
        raise SystemExit
    _callers.add(threading.current_thread())


class _Home:
    process: int | None = None


def is_forked() -> bool:
    """Whether experts were loaded in the process that this one was forked from."""
    return _Home.process not in (None, os.getpid())


def require_own_process() -> None:
    """Experts are loaded and used in one process; the first call decides which.

    Raises:
        KTKernelError: This is one that was forked from it.
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
    """Have the system end this process with the one that started it, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait(seconds: float = 5.0) -> None:
    """Stop the threads that computed experts at their next layer, and wait for them, all together this long at most."""
    _closing.set()
    deadline = time.monotonic() + seconds
    for thread in list(_callers):
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


atexit.register(wait)
