"""What the system is told about pages of memory and of mapped files: what they are for, and on which NUMA nodes they lie."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import platform
from typing import TYPE_CHECKING

import numpy as np

from .machine import numa_nodes

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
    """A new tensor for weights that all threads read: it begins with a huge page of its own, and its pages take turns over the NUMA nodes.
    What lies before it is never touched, and takes no memory."""
    import torch

    itemsize = dtype.itemsize
    memory = torch.empty(math.prod(shape) + HUGE_PAGE // itemsize, dtype=dtype, device="cpu")
    start = -memory.data_ptr() % HUGE_PAGE // itemsize
    weights = in_huge_pages(memory[start : start + math.prod(shape)].view(shape))
    if nodes := spread_over():
        first, last = _whole_pages(weights)
        interleave(first, last - first, nodes)
    return weights


HUGE_PAGE = 2 * 2**20
"""bytes; x86-64's and most ARM systems'"""


def _advise(tensor: torch.Tensor, advice: int) -> None:
    start, end = _whole_pages(tensor)
    if tensor.is_contiguous() and end > start:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def _whole_pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the pages begin and end that hold only this tensor."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE


def spread_over() -> list[int]:
    """The NUMA nodes whose memory weights take turns on: those whose CPUs this process may use. Empty where there is one, where the process
    has got another policy (``numactl --membind`` or ``--interleave``, which counts), or where the system refuses (containers).

    The system puts a page on the node of the thread that first writes to it. One thread copies weights, so they would all lie on one node,
    whose memory would then carry every token. Which thread reads which weight changes with the experts that a token chose, so no node would
    suit a page better than its turn (set_mempolicy(2), ``MPOL_INTERLEAVE``).
    """
    nodes = list(numa_nodes())
    return nodes if len(nodes) > 1 and policy() == (_MPOL_DEFAULT, []) else []


def is_refused() -> bool:
    """Whether the system does not let this process place memory, as containers without ``CAP_SYS_NICE``."""
    return policy() is None


def interleave(address: int, nbytes: int, nodes: list[int]) -> None:
    """Let whole pages that nobody has written to yet take turns over nodes. The system leaves out nodes without memory or that a cpuset
    forbids; what it refuses stays as it is, only slower."""
    mask = _Nodes()
    for node in nodes:
        mask[node // _WORD] |= 1 << node % _WORD
    _system_call(
        _MBIND,
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_int(_MPOL_INTERLEAVE),
        mask,
        ctypes.c_ulong(_MOST_NODES + 1),
        ctypes.c_uint(0),
    )


def policy(address: int | None = None) -> tuple[int, list[int]] | None:
    """The memory policy (a mode of ``linux/mempolicy.h``, its nodes) of this thread, or of the page at an address; None if the system does
    not tell."""
    mode, mask = ctypes.c_int(), _Nodes()
    flags = 0 if address is None else _MPOL_F_ADDR
    if _system_call(
        _GET_MEMPOLICY,
        ctypes.byref(mode),
        mask,
        ctypes.c_ulong(_MOST_NODES + 1),
        ctypes.c_void_p(address),
        ctypes.c_ulong(flags),
    ):
        return None
    return mode.value, [node for node in range(_MOST_NODES) if mask[node // _WORD] >> node % _WORD & 1]


def _system_call(number: int, *arguments: object) -> int:
    return int(ctypes.CDLL(None).syscall(ctypes.c_long(number), *arguments))


_MPOL_DEFAULT, _MPOL_INTERLEAVE = 0, 3
_MPOL_F_ADDR = 2
_MBIND, _GET_MEMPOLICY = {"x86_64": (237, 239), "aarch64": (235, 236)}.get(platform.machine(), (-1, -1))
"""system calls, which glibc has no functions for; -1 is none, and fails"""
_MOST_NODES = 1024
_WORD = 8 * ctypes.sizeof(ctypes.c_ulong)
_Nodes = ctypes.c_ulong * (_MOST_NODES // _WORD)
