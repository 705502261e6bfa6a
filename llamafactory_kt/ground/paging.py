"""Advice to the system about pages of memory and of mapped files."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def give_back_memory() -> None:
    """Return freed heap memory to the system (glibc's ``malloc_trim``).

    glibc keeps freed blocks of up to 32 MB, which adds up to gigabytes when tensors of that size come and go layer by layer.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def drop_pages(tensor: torch.Tensor) -> None:
    """Drop the pages of a mapped file that hold only this tensor from the process's resident memory.

    They stay in the system's page cache. The tensor must be contiguous, and must not be used any more.
    """
    _advise(tensor, mmap.MADV_DONTNEED)


def prefetch_pages(tensor: torch.Tensor) -> None:
    """Start reading the pages of a mapped file that hold only this tensor into the page cache; returns at once."""
    _advise(tensor, mmap.MADV_WILLNEED)


def in_huge_pages(memory: torch.Tensor) -> torch.Tensor:
    """Ask for huge pages (2 MiB) for a new tensor, and return it; the system allocates them as it is written to.

    Weights are read from end to end for each token, and 4 KiB pages cost TLB misses. Few distributions use huge pages unasked.
    """
    _advise(memory, mmap.MADV_HUGEPAGE)
    return memory


def _advise(tensor: torch.Tensor, advice: int) -> None:
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.is_contiguous() and end > start:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
