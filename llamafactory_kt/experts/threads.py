"""Threads that compute experts, and the end of the process.

Chats generate in daemon threads. Python kills those at exit wherever they are, and one that is killed inside C++ code
(the kernel's or torch's) takes the process down with SIGABRT; so they are stopped here and waited for before that.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref

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


def wait(seconds: float = 5.0) -> None:
    """Stop the threads that computed experts at their next layer, and wait for them, all together this long at most."""
    _closing.set()
    deadline = time.monotonic() + seconds
    for thread in list(_callers):
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


atexit.register(wait)
