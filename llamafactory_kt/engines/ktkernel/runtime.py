"""kt-kernel in this process: whether it runs, its lock, its output, and its end.

Its Python wrappers keep the pool of workers and the table of kernels in private names, which this room uses."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from ...ground.internals import SWITCH, Internal
from ...ground.machine import missing_cpu_flags
from ...ground.process import is_forked, join_threads
from ..streams import wait_for_streams

INTERNAL = Internal("kt-kernel", "kt-kernel", ">=0.7.2,<0.8")
kernel_lock = threading.Lock()
"""Held while a thread builds, calls or drops a kernel object: two must never be in the kernel at once. Tasks on a GPU's stream need no
lock: kt-kernel's pool takes one after the other from its queue."""

live_kernels: weakref.WeakSet[Any] = weakref.WeakSet()
"""every :class:`~.kernel.KernelObject` in use"""


def kernel_problem(kernel: str, *, sft: bool) -> str | None:
    """Why one of kt-kernel's kernels cannot run here, or None. Never raises.

    Args:
        kernel: its name: of an SFT method, or of an inference kernel's class.
        sft: which of the two.
    """
    if not INTERNAL.usable:
        return f"kt-kernel is not installed, is not {INTERNAL.versions}, or is switched off ({SWITCH})"
    if sft and (problem := _lacking("avx512_bf16")):  # before kt-kernel is imported, which takes a while
        return problem
    try:
        with quiet_stdout():
            import kt_kernel
            from kt_kernel import kt_kernel_ext
            from kt_kernel.sft.amx import _SFT_METHOD_TO_CLASS
    except ImportError as error:
        return f"kt-kernel is not installed or does not load ({error}); pip install 'kt-kernel{INTERNAL.versions}'"
    variant, forced = kt_kernel.__cpu_variant__, os.environ.get("KT_KERNEL_CPU_VARIANT")
    because = f" (its variant is forced by KT_KERNEL_CPU_VARIANT={forced}; unset that)" if forced else ""
    if problem := _lacking(variant):  # a forced variant would kill the process with SIGILL
        return problem + because
    found = _SFT_METHOD_TO_CLASS.get(f"{kernel}_SFT") if sft else getattr(kt_kernel_ext.moe, f"{kernel}_MOE", None)
    return None if found is not None else f"kt-kernel's variant {variant!r} has no kernel for {kernel}{because}"


def _lacking(build: str) -> str | None:
    missing = missing_cpu_flags(build)
    return f"this CPU lacks {', '.join(missing)}, which kt-kernel's kernels need" if missing else None


def cpu_variant() -> str:
    """The instruction-set variant kt-kernel chose, for example ``avx512_bf16`` or ``amx``."""
    import kt_kernel

    return str(kt_kernel.__cpu_variant__)


@atexit.register
def _shut_down() -> None:
    """Wait for threads that were in the kernel, then let it say goodbye into the void: its destructor writes to stdout
    after Python's own is closed. In a forked child, it would wait for workers that the child does not have."""
    if "kt_kernel.sft.amx" not in sys.modules:
        return
    join_threads()
    with contextlib.suppress(Exception), quiet_stdout():
        from kt_kernel.sft.amx import AMXSFTMoEWrapper

        if is_forked():
            for kept in (AMXSFTMoEWrapper._cpu_infer_instance, *(kernel.wrapper for kernel in live_kernels)):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))  # never destroyed
            return
        wait_for_streams()
        for kernel in list(live_kernels):
            kernel.release()
        AMXSFTMoEWrapper._cpu_infer_instance = None
        gc.collect()


@contextlib.contextmanager
def quiet_stdout(quiet: bool = True) -> Iterator[None]:
    """Keep what C++ code writes to file descriptor 1 out of the terminal. Python's own output is flushed first."""
    if not quiet:
        yield
        return
    _flush()
    saved, void = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(void, 1)
        yield
    finally:
        _flush()  # C buffers what it prints into a pipe
        os.dup2(saved, 1)
        os.close(saved)
        os.close(void)


def _flush() -> None:
    """Write out Python's and C's buffers of stdout."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)
