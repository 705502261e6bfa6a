"""What this machine offers: cores and memory that this process may use, NUMA nodes, CPU features."""

from __future__ import annotations

import contextlib
import math
import os
from functools import cache
from pathlib import Path

import psutil

AMX_FLAGS = ("amx_tile", "amx_int8", "amx_bf16")
# What kt-kernel's builds ask for (kt_kernel/_cpu_detect.py), each for what the one before it does and more.
_BUILDS = {
    "avx2": ("avx2",),
    "avx512_base": ("avx512f", "avx512bw"),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_vbmi": ("avx512_vbmi",),
    "avx512_bf16": ("avx512_bf16",),
    "amx": AMX_FLAGS,
}


def usable_cores() -> int:
    """Physical cores this process may use: within its CPU affinity and its cgroup's quota, at least 1."""
    return max(1, int(min(physical_cores(os.sched_getaffinity(0)), cgroup_cpus())))


def physical_cores(cpus: set[int]) -> int:
    """How many cores these CPUs, of which a core may have several, are."""
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:  # containers may hide the topology
            cores.add(str(cpu))
    return len(cores)


def cgroup_cpus() -> float:
    """CPUs that the process's cgroup lets it use at once, infinite without a quota."""
    for directory in _cgroup_directories():
        try:
            quota, period = (directory / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            return int(quota) / int(period)
    return math.inf


def _cgroup_directories() -> list[Path]:
    """The process's cgroup (version 2) and its parents."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [root]
    own = next((root / line[4:].removeprefix("/") for line in lines if line.startswith("0::/")), root)
    return [own, *(parent for parent in own.parents if parent == root or root in parent.parents)]


def numa_nodes() -> dict[int, set[int]]:
    """NUMA nodes with CPUs that this process may use, and which those are; one at least.

    >>> list(numa_nodes().values())[0] <= os.sched_getaffinity(0)
    True
    """
    allowed, nodes = os.sched_getaffinity(0), {}
    for file in Path("/sys/devices/system/node").glob("node[0-9]*/cpulist"):
        if cpus := allowed & _listed(file.read_text()):
            nodes[int(file.parent.name.removeprefix("node"))] = cpus
    return dict(sorted(nodes.items())) or {0: allowed}


def _listed(text: str) -> set[int]:
    """The numbers of one of the system's lists.

    >>> sorted(_listed("0-2,7"))
    [0, 1, 2, 7]
    """
    ranges = (part.partition("-") for part in text.strip().split(",") if part)
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}


def cgroup_memory() -> float:
    """Bytes that the process's cgroup lets all its processes have together, infinite without a limit."""
    limits = [math.inf]
    for directory in _cgroup_directories():
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            limits.append(int((directory / "memory.max").read_text()))
    return min(limits)


def available_memory() -> int:
    """Bytes this process can still take without swapping, within its cgroup's limit."""
    available: int = psutil.virtual_memory().available
    for directory in _cgroup_directories():
        try:
            limit = (directory / "memory.max").read_text().strip()
            used = int((directory / "memory.current").read_text())
            cached = sum(
                int(line.split()[1])
                for line in (directory / "memory.stat").read_text().splitlines()
                if line.startswith(("inactive_file ", "active_file "))
            )
        except (OSError, ValueError):
            continue
        if limit != "max":
            available = min(available, int(limit) - used + cached)
    return max(0, available)


def cache_directory() -> Path:
    """``LLAMAFACTORY_KT_CACHE``, else ``llamafactory-kt`` below ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("LLAMAFACTORY_KT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llamafactory-kt"


@cache
def _cpu_info() -> dict[str, str]:
    """/proc/cpuinfo of the first CPU."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """The CPU as it calls itself."""
    return _cpu_info().get("model name", "unknown CPU")


def missing_cpu_flags(build: str = "avx512_bf16") -> list[str]:
    """Instruction sets of one of kt-kernel's builds that this CPU lacks, by /proc/cpuinfo's names. The BF16 SFT kernel
    needs those of ``avx512_bf16`` at least."""
    flags = set(_cpu_info().get("flags", "").split())
    if not flags:  # /proc is hidden
        return []
    builds = list(_BUILDS)
    last = builds.index(build if build in builds else "avx512_bf16")
    wanted = [flag for name in builds[: last + 1] for flag in _BUILDS[name]]
    return [flag for flag in wanted if flag not in flags and flag.replace("_", "") not in flags]


def gib(size: float) -> str:
    """Bytes for people.

    >>> gib(4187593113), gib(13107200), gib(5120)
    ('3.9 GiB', '12.5 MiB', '5.0 KiB')
    """
    if size < 0.1 * 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
