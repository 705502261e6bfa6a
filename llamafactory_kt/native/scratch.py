"""Memory that calls of the kernels share, one after the other."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import threading
import weakref

import torch

from .recording import active

_ALIGNMENT = 64


class _Memory(threading.local):
    tensor = torch.empty(0, dtype=torch.uint8)


_memory = _Memory()
_every: dict[int, weakref.ref[torch.Tensor]] = {}
"""thread -> its memory"""


def scratch(nbytes: int) -> int:
    """The address of at least so many bytes, aligned to 64, of this thread; the next call in it gets the same."""
    if _memory.tensor.nbytes < nbytes + _ALIGNMENT:
        with active.recorder.pause() if active.recorder is not None else contextlib.nullcontext():
            _memory.tensor = torch.empty(nbytes + _ALIGNMENT, dtype=torch.uint8)
        _every[threading.get_ident()] = weakref.ref(_memory.tensor)  # in the place of a thread's that has ended
    return -(-_memory.tensor.data_ptr() // _ALIGNMENT) * _ALIGNMENT


@atexit.register
def _leave_to_the_system() -> None:
    """Python, while it ends, drops what threads own, also of those that still compute: the kernels would write to freed memory."""
    for tensor in [found for reference in list(_every.values()) if (found := reference()) is not None]:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor))
