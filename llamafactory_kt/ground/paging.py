"""What the process keeps of memory that it has used: freed blocks, and pages of mapped files."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def give_back_memory() -> None:
    """Return freed memory to the system. glibc keeps freed blocks of up to 32 MB for itself, which adds up to gigabytes
    where tensors of that size come and go layer by layer."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def forget_pages(tensor: torch.Tensor) -> None:
    """Drop a mapped file's pages from the process's resident memory, those that are the tensor's alone; the system's
    cache keeps them. The tensor, which must be contiguous, is not to be used any more."""
    _advise(tensor, mmap.MADV_DONTNEED)


def expect_pages(tensor: torch.Tensor) -> None:
    """Have the system read a mapped file's pages into its cache, those that are the tensor's alone, and return at once."""
    _advise(tensor, mmap.MADV_WILLNEED)


def in_large_pages(memory: torch.Tensor) -> torch.Tensor:
    """The tensor, which must be new: the system puts it into pages of 2 MiB, where it can, as it is written to.

    Few distributions do that unasked. Weights are read from end to end for each token, and looking up the addresses of
    pages of 4 KiB is up to a tenth of the time.
    """
    _advise(memory, mmap.MADV_HUGEPAGE)
    return memory


def _advise(tensor: torch.Tensor, advice: int) -> None:
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.is_contiguous() and end > start:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
