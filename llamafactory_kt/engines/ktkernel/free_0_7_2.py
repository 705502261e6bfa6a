"""Freeing the packed weights of an SFT kernel, which kt-kernel 0.7.2 never does.

For every expert and sub-pool, kt-kernel takes three buffers from ``aligned_alloc``, and no destructor frees them. We read their
addresses from the object before it goes, along its own pointers (kt-kernel's sources under ``operators``):

    moe-tp.hpp           TP_MOE_Common   vector<unique_ptr<part>> tps               one part a sub-pool
    amx/moe_base.hpp     AMX_MOE_BASE    vector<shared_ptr<BufferB>> gate_bb_ ...   one buffer an expert, for each projection
    amx/la/amx_*.hpp     BufferB         {b; d with integers only; int n, k}        b is what aligned_alloc returned

Why this is safe: we read memory through /proc/self/mem, where a wrong address is an error and not a crash. We free a buffer only
if every address of the object validates: each vector has its exact length; each buffer its exact n and k, the place of its scales,
its alignment, and a block of the allocator of just its size; no two are the same. Other versions and other builds may lay out their
objects differently, or free them: there, nothing is freed. kt-kernel frees LoRA and work buffers itself.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import struct
import sys
from collections import deque
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from ...ground.file_hash import file_sha256
from ...ground.internals import Internal
from ...ground.machine import gib
from ...ground.paging import give_back_memory
from ..streams import wait_for_streams
from .methods import Method, PackedShape

logger = logging.getLogger(__name__)

INTERNAL = Internal("kt-kernel-memory", "kt-kernel", "==0.7.2")
BUILDS = frozenset(
    {
        "34490aa21f57385556a087af505cbc1144faa562e6fcdce37fa235d58a5781fe",  # amx, Python 3.11
        "71bdda5a26d4e160ac572e443ed0b6a594f492b04a71f382325c14dcffb715b0",  # avx512_bf16, Python 3.11
        "07d6cba968e713a623e23fc452229f498f994553f52c892776b2b51dbc16050d",  # amx, Python 3.12
        "17e7c0b618ac51efa9cdc6f266e05cf20f6c6938fad8c6a57b9c3d09cbfe4281",  # avx512_bf16, Python 3.12
    }
)
"""SHA-256 of the extension modules in PyPI's wheels that have SFT kernels"""
_VALUE = 16  # pybind11's pointer to the C++ object, after the head of a Python object
_TPS = 40
_PROJECTIONS = (232, 280, 352)  # gate_bb_, up_bb_, down_bb_ in a part
_ALIGNMENT = 64
_PAGE = 4096
_MMAPPED = 2
_SLACK = _PAGE + 2 * _ALIGNMENT  # blocks of their own are rounded up to pages

building = Lock()
"""held while a kernel object is built or released: both change kt-kernel's list of shared work buffers"""
_dropped: deque[tuple[Any, PackedShape]] = deque()


class UnknownLayoutError(Exception):
    """An object is not laid out as the sources of the known version say."""


def drop(wrapper: Any, shape: PackedShape) -> None:
    """Release a wrapper's kernel object and free its packed weights. Nobody may be computing with it.

    May be called from a finalizer in any thread, also while another object is built: then the building thread frees it.
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
    wait_for_streams()
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
    """Return freed memory to the system after the next full garbage collection: the rest of a model goes with its kernel objects or
    shortly after, and LLaMA-Factory collects garbage when it unloads a model."""
    if phase == "stop" and info["generation"] == 2:
        gc.callbacks.remove(_give_back)
        give_back_memory()


def packed_buffers(moe: Any, shape: PackedShape) -> list[int]:
    """Addresses of all packed weights of one of kt-kernel's MoE objects.

    Raises:
        UnknownLayoutError: Anything differs from what it should be.
        OSError: This process may not read its own memory, or an address was none.
    """
    if not INTERNAL.usable:
        raise UnknownLayoutError(f"switched off, or kt-kernel is not {INTERNAL.versions}")
    if (found := _build()) not in BUILDS:
        raise UnknownLayoutError(f"kt-kernel's extension module is another build ({found})")
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


@cache
def _build() -> str:
    """SHA-256 of the extension module in use."""
    from kt_kernel import kt_kernel_ext

    return file_sha256(Path(kt_kernel_ext.__file__))


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
