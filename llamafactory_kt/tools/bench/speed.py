"""The machine's speed while a bench runs, in a process of its own, and when a process has come to rest."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

BANDWIDTH_BUFFER = 2**30
"""bytes that one measurement of the memory bandwidth reads: more than the caches hold"""
SETTLE_TIMEOUT = 2.0
"""seconds"""
_PRODUCT = 512, 4096, 4096
"""rows, inner size and columns of the large product: torch is as fast with larger ones"""


@dataclass(frozen=True)
class Speed:
    """What the machine does at one moment; its memory and its cores are often shared with others."""

    reads: float
    """memory bandwidth, bytes per second"""
    products: float
    """rate of a large matrix product, floating-point operations per second"""


def serve_speed(pipe: Connection, threads: int) -> None:
    """Send True when ready, then answer each request with the machine's :class:`Speed`: of a sum over a large tensor in huge pages,
    and of a large product in bfloat16, or in float32 where that is faster."""
    import torch

    from ...ground.paging import in_huge_pages

    torch.set_num_threads(threads)
    # The threads that read the buffer fill it, so its pages lie on their NUMA nodes.
    buffer = in_huge_pages(torch.empty(BANDWIDTH_BUFFER // 4)).fill_(1)
    rows, inner, columns = _PRODUCT
    factors = [torch.ones(rows, inner), torch.ones(inner, columns)]
    dtype = min(
        torch.bfloat16,
        torch.float32,
        key=lambda dtype: median_seconds(torch.mm, *(f[:256, :256].to(dtype) for f in factors)),
    )
    factors = [factor.to(dtype) for factor in factors]
    pipe.send(True)
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            pipe.recv()
            speed = Speed(
                BANDWIDTH_BUFFER / median_seconds(buffer.sum),
                2 * rows * inner * columns / median_seconds(torch.mm, *factors),
            )
            settle()
            pipe.send(speed)


def median_seconds(call: Callable[..., object], *arguments: object) -> float:
    """Median of a few calls, without the first."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def wall_and_cpu() -> tuple[float, float]:
    """(seconds, CPU seconds of this process)"""
    return time.perf_counter(), time.process_time()


def settle() -> tuple[float, float]:
    """Wait until this process's threads sleep; kt-kernel's workers and OpenMP's threads spin for a while after their work.

    Returns:
        :func:`wall_and_cpu` afterwards.
    """
    deadline = time.perf_counter() + SETTLE_TIMEOUT
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(0.06)
        if time.process_time() - used < 0.003:
            break
    return wall_and_cpu()
