"""Memory that calls of the kernels share, one after the other."""

from __future__ import annotations

import contextlib
import threading

import torch

from .recording import active

_ALIGNMENT = 64


class _Memory(threading.local):
    tensor = torch.empty(0, dtype=torch.uint8)


_memory = _Memory()


def scratch(nbytes: int) -> int:
    """The address of at least so many bytes, aligned to 64, of this thread; the next call in it gets the same."""
    if _memory.tensor.nbytes < nbytes + _ALIGNMENT:
        with active.recorder.pause() if active.recorder is not None else contextlib.nullcontext():
            _memory.tensor = torch.empty(nbytes + _ALIGNMENT, dtype=torch.uint8)
    return -(-_memory.tensor.data_ptr() // _ALIGNMENT) * _ALIGNMENT
