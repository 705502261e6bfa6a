"""Memory of this process, on the CPU and on GPUs, in bytes."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import psutil


def resident_memory() -> int:
    return int(psutil.Process().memory_info().rss)


def proportional_memory() -> int | None:
    """``Pss`` of proc_pid_smaps_rollup(5): resident memory, of which a page that N processes map counts as 1/N; None where the system
    does not tell."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def peak_resident_memory() -> int:
    """``VmHWM`` of proc_pid_status(5), which psutil does not report; the kernel updates it only now and then."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return max(resident_memory(), int(found[1]) * 1024 if found else 0)


def reset_peak_resident_memory() -> None:
    """Reset ``VmHWM`` (proc_pid_clear_refs(5)); if that is forbidden, the next peak includes what came before."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gpu_memory() -> int:
    """Peak memory that torch has allocated, summed over the GPUs."""
    import torch

    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
