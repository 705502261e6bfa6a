"""What the process keeps of memory that it has used: freed blocks, and pages of mapped files."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_KEPT = 1 << 30
_LARGEST_FREED = 32 << 20
"""as high as glibc's own threshold rises (mallopt(3), M_MMAP_THRESHOLD)"""


def give_back_memory() -> None:
    """Return freed memory to the system. glibc keeps freed blocks of up to 32 MB for itself, which adds up to gigabytes
    where tensors of that size come and go layer by layer."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class _Keepers:
    lock, count = threading.Lock(), 0


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Until all who asked for it are done, freed memory waits for the next tensor; then it is given back.

    Otherwise glibc returns blocks of more than 32 MB at once, and others once 64 MB of them are free, and the system
    clears each page anew for the next layer's tensors: a tenth of the time of a prompt of 1024 tokens.
    """
    with _Keepers.lock:
        _Keepers.count += 1
        _set_thresholds(_KEPT)
    try:
        yield
    finally:
        with _Keepers.lock:
            _Keepers.count -= 1
            if not _Keepers.count:
                _set_thresholds(_LARGEST_FREED)
                give_back_memory()


def _set_thresholds(size: int) -> None:
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, size)  # glibc before 2.35 refuses more than 32 MB
        libc.mallopt(trim_threshold, 2 * size - 1)


def forget_pages(tensor: torch.Tensor) -> None:
    """Drop a mapped file's pages from the process's resident memory, those that are the tensor's alone; the system's
    cache keeps them. The tensor, which must be contiguous, is not to be used any more."""
    _advise(tensor, mmap.MADV_DONTNEED)


def expect_pages(tensor: torch.Tensor) -> None:
    """Have the system read a mapped file's pages into its cache, those that are the tensor's alone, and return at once."""
    _advise(tensor, mmap.MADV_WILLNEED)


def _advise(tensor: torch.Tensor, advice: int) -> None:
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.is_contiguous() and end > start:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
