"""kt-kernel's pool of worker threads (CPUInfer): how many, and on which NUMA nodes and CPUs.

A process has one pool, so the first load decides.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from ...ground.machine import numa_nodes

logger = logging.getLogger(__name__)


_fixed: tuple[int, int] | None = None


def fix_pool(threads: int, pools: int) -> tuple[int, int]:
    """Fix the process's worker threads and sub-pools.

    Returns:
        Those in force: the first load's, since kt-kernel cannot change them.
    """
    global _fixed
    if _fixed is None:
        _fixed = threads, pools
    elif _fixed != (threads, pools):
        logger.warning(
            "kt-kernel already runs with %d threads in %d sub-pool(s) in this process and keeps them "
            "(asked for: %d in %d); start a new process to change that.",
            *_fixed, threads, pools,
        )  # fmt: skip
    return _fixed


def fixed_pool() -> tuple[int, int]:
    """Worker threads and sub-pools; one of each where nothing was fixed."""
    return _fixed or (1, 1)


def worker_pool(threads: int | None = None, pools: int | None = None) -> Any:
    """The pool, made on first use: each sub-pool on one of the NUMA nodes that this process may use, and every worker within the
    process's CPU affinity. kt-kernel itself counts nodes and cores from 0, even where ``taskset``, ``numactl`` or a container allows
    others.

    Args:
        threads: instead of :func:`fix_pool`'s.
        pools: likewise; may be more than there are nodes.
    """
    from kt_kernel.sft.amx import AMXSFTMoEWrapper

    fixed = fixed_pool()
    threads, pools = threads or fixed[0], pools or fixed[1]
    nodes, made = numa_nodes(), AMXSFTMoEWrapper._cpu_infer_instance is None
    infer = AMXSFTMoEWrapper._get_cpu_infer(threads, pools, list(islice(cycle(nodes), pools)))
    if made:
        _confine(nodes)
    return infer


def worker_threads() -> Iterator[tuple[int, int]]:
    """(thread id, NUMA node) of every worker; some may have ended."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            if found := re.match(r"numa_(\d+)_", (task / "comm").read_text()):
                yield int(task.name), int(found[1])


def _confine(nodes: dict[int, set[int]]) -> None:
    allowed = os.sched_getaffinity(0)
    for thread, node in worker_threads():
        with contextlib.suppress(OSError):
            if not os.sched_getaffinity(thread) <= allowed:
                os.sched_setaffinity(thread, nodes.get(node) or allowed)
