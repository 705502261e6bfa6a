"""Giving back the packed weights of a kernel object, which kt-kernel 0.7.2 never frees.

For every expert and sub-pool, kt-kernel takes three buffers from ``aligned_alloc``, and no destructor frees them. Their
addresses are read from the object before it goes, along its own pointers (kt-kernel's sources under ``operators``):

    moe-tp.hpp           TP_MOE_Common   vector<unique_ptr<part>> tps               one part a sub-pool
    amx/moe_base.hpp     AMX_MOE_BASE    vector<shared_ptr<BufferB>> gate_bb_ ...   one buffer an expert, for each projection
    amx/la/amx_*.hpp     BufferB         {b; d with integers only; int n, k}        b is what aligned_alloc returned

Why this is safe: memory is only read, through the kernel's /proc/self/mem, where a wrong address is an error and no
crash. Addresses are believed for all buffers of an object or for none: every vector must have its exact length, every
buffer its exact n and k (and the place of its scales), its alignment, and a block of the allocator of just its size; no
two may be the same. Other versions may lay out their objects differently or free them: nothing is freed there. LoRA and
work buffers are the kernel's own to free, and it does.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import struct
import sys
from collections import deque
from importlib.metadata import version
from threading import Lock
from typing import Any, BinaryIO

from ...ground.machine import gib
from ...ground.paging import give_back_memory
from .methods import Method, PackedShape
from .stream import settle

logger = logging.getLogger(__name__)

KNOWN_VERSION = "0.7.2"
_VALUE = 16  # pybind11's pointer to the C++ object, after the head of a Python object
_TPS = 40
_PROJECTIONS = (232, 280, 352)  # gate_bb_, up_bb_, down_bb_ in a part
_ALIGNMENT = 64
_PAGE = 4096
_MMAPPED = 2
_SLACK = _PAGE + 2 * _ALIGNMENT  # blocks of their own are rounded up to pages

building = Lock()
"""Held while a kernel object is built or goes: both change kt-kernel's list of shared work buffers."""
_dropped: deque[tuple[Any, PackedShape]] = deque()


class UnknownLayoutError(Exception):
    """An object is not laid out as the sources of the known version say."""


def drop(wrapper: Any, shape: PackedShape) -> None:
    """Let a wrapper's kernel object go, and free its packed weights. Nobody may be computing with it.

    May be called from a finalizer in any thread, also within the construction of another: then that thread does it.
    """
    _dropped.append((wrapper, shape))
    free_dropped()


def free_dropped() -> None:
    """Free what was dropped while :data:`building` was held; its holder calls this afterwards."""
    while _dropped and building.acquire(blocking=False):
        try:
            if _dropped:
                _free(*_dropped.popleft())
        finally:
            building.release()


def _free(wrapper: Any, shape: PackedShape) -> None:
    settle()
    try:
        buffers = packed_buffers(wrapper.moe, shape)
        if sys.getrefcount(wrapper.moe) != 2:  # the wrapper's, and the one this call holds
            raise UnknownLayoutError("somebody else refers to the kernel object")
    except (UnknownLayoutError, OSError) as reason:
        logger.debug("%s of packed weights stay in memory until the process ends: %s.", gib(shape.nbytes), reason)
        buffers = []
    wrapper.moe = None
    for address in buffers:
        ctypes.CDLL(None).free(ctypes.c_void_p(address))
    if _give_back not in gc.callbacks:
        gc.callbacks.append(_give_back)


def _give_back(phase: str, info: dict[str, int]) -> None:
    """Return what was freed to the system after the next full collection of garbage: the rest of a model goes with its
    kernel objects, or shortly after them, and LLaMA-Factory collects garbage when it unloads one."""
    if phase == "stop" and info["generation"] == 2:
        gc.callbacks.remove(_give_back)
        give_back_memory()


def packed_buffers(moe: Any, shape: PackedShape) -> list[int]:
    """Addresses of all packed weights of one of kt-kernel's MoE objects.

    Raises:
        UnknownLayoutError: Anything differs from what it should be.
        OSError: This process may not read its own memory, or an address was none.
    """
    if (found := version("kt-kernel")) != KNOWN_VERSION:
        raise UnknownLayoutError(f"kt-kernel is {found}, and {KNOWN_VERSION} is known")
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        (value,) = _words(memory, id(moe) + _VALUE, 1)
        buffers = [
            _buffer(memory, pointer, shape.method, *matrix)
            for part in _vector(memory, value + _TPS, shape.pools)
            for offset, matrix in zip(_PROJECTIONS, shape.matrices, strict=True)
            for pointer in _vector(memory, part + offset, 2 * shape.num_experts)[::2]  # each with its control block
        ]
    if len(set(buffers)) != 3 * shape.num_experts * shape.pools:
        raise UnknownLayoutError("two experts share a buffer")
    return buffers


def _words(memory: BinaryIO, address: int, count: int) -> tuple[int, ...]:
    try:
        memory.seek(address)
        data = memory.read(8 * count)
    except OverflowError:
        data = b""
    if len(data) != 8 * count:
        raise UnknownLayoutError(f"{address:#x} is not readable")
    return struct.unpack(f"<{count}Q", data)


def _vector(memory: BinaryIO, address: int, count: int) -> tuple[int, ...]:
    """The ``count`` words of a std::vector."""
    begin, end, capacity = _words(memory, address, 3)
    if not begin or end - begin != 8 * count or capacity < end:
        raise UnknownLayoutError(f"no vector of {count} words at {address:#x}")
    return _words(memory, begin, count)


def _buffer(memory: BinaryIO, pointer: int, method: Method, n: int, k: int) -> int:
    """Where a BufferB of n rows and k columns has its weights."""
    weights, *scales, size = _words(memory, pointer, 2 if method.bits == 16 else 3)
    expected = [weights + n * k * method.bits // 8] if scales else []
    if size != n | k << 32 or scales != expected or not weights or weights % _ALIGNMENT:
        raise UnknownLayoutError(f"no buffer of {n} x {k} at {pointer:#x}")
    if not 0 <= _usable(memory, weights) - method.nbytes(n, k) < _SLACK:
        raise UnknownLayoutError(f"no block of {method.nbytes(n, k)} bytes at {weights:#x}")
    return weights


def _usable(memory: BinaryIO, address: int) -> int:
    """Bytes of a block in use that glibc's allocator gave out, -1 for anything else ("chunk" in its malloc.c). Its own
    malloc_usable_size crashes with an address inside of a block."""
    chunk = address - 16
    lead, size = _words(memory, chunk, 2)
    flags, size = size % 8, size & -8
    if flags == _MMAPPED:
        return size - 16 if not (chunk - lead) % _PAGE and not (lead + size) % _PAGE else -1
    _, following = _words(memory, chunk + size, 2)
    return size - 8 if following % 2 else -1  # the following chunk's flag says that this one is in use
