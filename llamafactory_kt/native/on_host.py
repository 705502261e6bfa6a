"""Calls of the kernels that a GPU's stream makes, without Python: while it runs, or in a CUDA graph that holds them.

``cudaLaunchHostFunc`` (CUDA Runtime API, "Execution Control") queues a function of the host on a stream, or adds it to the graph that is
being captured. It is called in the CUDA runtime that torch has loaded. Two such functions of the native library make a call: one hands it
to the thread that computes, and one waits for it (``src/on_host.cpp``). What is queued between them runs at the same time.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections import deque
from collections.abc import Iterator
from ctypes import CDLL, POINTER, Structure, byref, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Protocol

from ..ground.internals import TESTED, Internal
from .library import ExpertsCall, kernels, library

INTERNAL = Internal("cuda-runtime", "torch", TESTED["torch"])
_RELAXED = 2
"""cudaStreamCaptureModeRelaxed"""
_FINISHED = 3
"""``kt_host_call.state``"""


class HostCall(Structure):
    """``kt_host_call``."""

    _fields_ = (
        ("experts", POINTER(ExpertsCall)), ("x", c_void_p), ("index", c_void_p), ("scores", c_void_p), ("out", c_void_p),
        ("tokens", c_int64), ("top", c_int64), ("chunk", c_int64), ("x_dtype", c_int32), ("threads", c_int32), ("state", c_int32),
        ("next", c_void_p),
    )  # fmt: skip


class Stream(Protocol):
    """What is used of a stream."""

    cuda_stream: int

    @property
    def capturing(self) -> bool: ...


class HostCalls:
    """The calls that streams make for one layer. Each is kept as long as a stream may come to it; those in graphs, which may be replayed at
    any time, as long as this object."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queued: deque[HostCall] = deque()
        self._captured: list[HostCall] = []

    @contextlib.contextmanager
    def queue(self, stream: Stream, call: HostCall) -> Iterator[None]:
        """Let the stream start a call when it comes to the block, and wait for it at the block's end.

        Raises:
            IndexError: as :func:`raise_failure`.
            RuntimeError: CUDA refuses.
        """
        raise_failure()
        with self._lock:
            while self._queued and self._queued[0].state == _FINISHED:
                self._queued.popleft()
            (self._captured if stream.capturing else self._queued).append(call)
        _launch(stream, "kt_start_on_host", call)
        try:
            yield
        finally:
            _launch(stream, "kt_finish_on_host", call)  # else the next layer would write what this one still reads

    def __len__(self) -> int:
        """Calls that are kept."""
        return len(self._queued) + len(self._captured)


def raise_failure() -> None:
    """Raise what a stream's call has failed with since this was called last. Its result was NaN.

    Raises:
        IndexError: A router chose an expert that does not exist.
        MemoryError: There was no scratch memory.
    """
    failed = _functions().kt_failed_on_host() if isinstance(library(), CDLL) else 0
    if failed > 0:
        raise IndexError(f"The router chose an expert that is none of the {failed}.")
    if failed:
        raise MemoryError("There was too little memory to compute experts.")


@cache
def cuda_runtime() -> CDLL | None:
    """The CUDA runtime that torch has loaded, if it has."""
    if not INTERNAL.usable:
        return None
    for path in sorted(set(re.findall(r"\S*/libcudart[^/\s]*\.so\S*", Path("/proc/self/maps").read_text()))):
        found = CDLL(path)
        if hasattr(found, "cudaLaunchHostFunc"):
            found.cudaLaunchHostFunc.argtypes = [c_void_p, c_void_p, c_void_p]
            found.cudaThreadExchangeStreamCaptureMode.argtypes = [POINTER(c_int)]
            return found
    return None


@contextlib.contextmanager
def relaxed_capture() -> Iterator[None]:
    """While a graph is being captured: allow what a graph does not hold, as memory to be page-locked."""
    runtime, mode = cuda_runtime(), c_int(_RELAXED)
    assert runtime is not None
    runtime.cudaThreadExchangeStreamCaptureMode(byref(mode))
    try:
        yield
    finally:
        runtime.cudaThreadExchangeStreamCaptureMode(byref(mode))


def _launch(stream: Stream, name: str, call: HostCall) -> None:
    runtime = cuda_runtime()
    assert runtime is not None
    function = ctypes.cast(getattr(_functions(), name), c_void_p)
    if error := runtime.cudaLaunchHostFunc(stream.cuda_stream, function, ctypes.addressof(call)):
        raise RuntimeError(f"cudaLaunchHostFunc failed with CUDA's error {error}.")


@cache
def _functions() -> CDLL:
    """The library, ready for calls of a stream."""
    found = kernels()
    found.kt_failed_on_host.restype = c_int64
    found.kt_set_thread(ctypes.cast(CDLL(None).pthread_create, c_void_p))
    return found


__all__ = ["HostCall", "HostCalls", "cuda_runtime", "raise_failure", "relaxed_capture"]
