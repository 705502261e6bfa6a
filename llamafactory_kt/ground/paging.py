"""Advice to the system about pages of memory and of mapped files."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def give_back_memory() -> None:
    """Return freed heap memory to the system (glibc's ``malloc_trim``).

    glibc keeps freed blocks of up to 32 MB, which adds up to gigabytes when tensors of that size come and go layer by layer.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def share_heaps() -> None:
    """Let glibc have one heap per core, unless the environment says how many; as early as possible, before threads have theirs.

    It has up to eight per core. Each answer that is streamed has a thread of its own, which takes any of them, and each of them keeps
    the little that its threads leave behind: a server grew by megabytes every thousand answers, with the same objects in it.
    """
    if "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, max(2, os.cpu_count() or 1))


_M_ARENA_MAX = -8
"""of glibc's malloc.h"""


def drop_pages(tensor: torch.Tensor) -> None:
    """Drop the pages of a mapped file that hold only this tensor from the process's resident memory.

    They stay in the system's page cache, from where whoever still uses them gets them back. The tensor must be contiguous, and its
    memory a file's that nobody has written to (:func:`are_of_a_file`): of other memory the values would be lost.
    """
    _advise(tensor, mmap.MADV_DONTNEED)


def are_of_a_file(tensor: torch.Tensor) -> bool:
    """Whether dropping a contiguous tensor's pages loses nothing: they are a file's, and nobody has written to them. False where
    ``/proc/self/pagemap`` (proc_pid_pagemap(5)) cannot be read."""
    first, last = tensor.data_ptr() // mmap.PAGESIZE, -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            pages = np.frombuffer(os.pread(file.fileno(), 8 * (last - first), 8 * first), np.uint64) >> np.uint64(61)
    except OSError:
        return False
    return len(pages) == last - first and bool(_NOTHING_LOST[pages].all())


_NOTHING_LOST = np.array([True, True, False, False, False, True, False, False])
"""by the upper three bits of a page's entry: present, swapped, of a file or shared. A page that is neither present nor swapped holds
nothing yet"""


def prefetch_pages(tensor: torch.Tensor) -> None:
    """Start reading the pages of a mapped file that hold only this tensor into the page cache; returns at once."""
    _advise(tensor, mmap.MADV_WILLNEED)


def in_huge_pages(memory: torch.Tensor) -> torch.Tensor:
    """Ask for huge pages (2 MiB) for a new tensor, and return it; the system allocates them as it is written to.

    Weights are read from end to end for each token, and 4 KiB pages cost TLB misses. Few distributions use huge pages unasked.
    """
    _advise(memory, mmap.MADV_HUGEPAGE)
    return memory


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A new tensor that begins with a huge page of its own. What lies before it is never touched, and takes no memory."""
    import torch

    itemsize = dtype.itemsize
    memory = torch.empty(math.prod(shape) + HUGE_PAGE // itemsize, dtype=dtype, device="cpu")
    start = -memory.data_ptr() % HUGE_PAGE // itemsize
    return in_huge_pages(memory[start : start + math.prod(shape)].view(shape))


HUGE_PAGE = 2 * 2**20
"""bytes; x86-64's and most ARM systems'"""


def _advise(tensor: torch.Tensor, advice: int) -> None:
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.is_contiguous() and end > start:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
