"""How fast this machine reads memory: what no decoding of weights in memory can outrun."""

from __future__ import annotations

import contextlib
import statistics
import time
from multiprocessing.connection import Connection

SIZE = 2**30
"""bytes read at once, more than caches hold"""


def serve_bandwidth(pipe: Connection, threads: int) -> None:
    """Send True when ready, then answer each question with the bytes read in a second."""
    import torch

    from .process import settle

    torch.set_num_threads(threads)
    memory = torch.ones(SIZE // 4)  # filled by the threads that will read it, so spread over the NUMA nodes as they are
    pipe.send(True)
    with contextlib.suppress(EOFError):  # whoever asked is gone
        while True:
            pipe.recv()
            times = []
            for _ in range(6):
                started = time.perf_counter()
                memory.sum()
                times.append(time.perf_counter() - started)
            settle()
            pipe.send(SIZE / statistics.median(times[1:]))
