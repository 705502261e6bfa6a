"""Work that Ctrl-C does not leave half done.

Python raises KeyboardInterrupt in the main thread, between any two lines, also those that undo or clean up. So such work is done by a
thread of its own: it is completed, or ends with an error of its own that it undoes, whenever the interrupt comes.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")


@cache
def _threads() -> ThreadPoolExecutor:
    """Threads that rest between works: glibc gives each new one a heap, which keeps what was freed in it."""
    os.register_at_fork(after_in_child=_threads.cache_clear)
    return ThreadPoolExecutor(max_workers=64, thread_name_prefix="uninterrupted")


def uninterrupted(work: Callable[[], Result]) -> Result:
    """Do the work as the calling thread would, with its modes of PyTorch and its context, and wait for its end.

    Raises:
        KeyboardInterrupt: The calling thread was interrupted. The work is at its end; in the few steps around the wait, it may go on, and
            Python does not exit before it ends.
        BaseException: What the work raised.
    """
    ended: list[tuple[Result] | BaseException] = []
    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    context = contextvars.copy_context()

    def run() -> None:
        if not begun.acquire(blocking=False):  # handed over twice, when the first time was interrupted
            return
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.inference_mode(modes[0]), torch.set_grad_enabled(modes[1]):
                ended.append((context.run(work),))
        except BaseException as error:
            ended.append(error)
        finally:
            at_work.release()

    begun = threading.Lock()
    at_work = threading.Lock()  # Thread.join() of Python 3.11 takes an interrupted thread for ended
    at_work.acquire()
    interrupt: KeyboardInterrupt | None = None
    while not ended:
        try:
            if not begun.locked():
                _threads().submit(run)
            at_work.acquire()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
    (end,) = ended
    if isinstance(end, BaseException):
        raise end
    return end[0]
