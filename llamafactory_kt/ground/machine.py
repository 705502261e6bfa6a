"""What this machine offers: cores and memory that this process may use, NUMA nodes, CPU features."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psutil

AMX_FLAGS = ("amx_tile", "amx_int8", "amx_bf16")
# What kt-kernel's builds need (kt_kernel/_cpu_detect.py). Each also needs what the builds before it need. They stand here, and not
# with the engines, because doctor asks even where torch cannot be imported.
_BUILDS = {
    "avx2": ("avx2",),
    "avx512_base": ("avx512f", "avx512bw"),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_vbmi": ("avx512_vbmi",),
    "avx512_bf16": ("avx512_bf16",),
    "amx": AMX_FLAGS,
}


def usable_cores() -> int:
    """Physical cores that this process may use, within its CPU affinity and its cgroup's quota; at least 1."""
    return max(1, int(min(physical_cores(os.sched_getaffinity(0)), cgroup_cpus())))


def physical_cores(cpus: set[int]) -> int:
    """Number of physical cores that these logical CPUs belong to."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:  # containers may hide the topology
            cores.add(str(cpu))
    return len(cores)


def _cgroups(controller: str) -> list[Path]:
    """The process's cgroup that limits ``cpu`` or ``memory``, and its parents; of version 1 where that has the controller."""
    top = Path("/sys/fs/cgroup")
    paths = {"": "/"}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)  # cgroups(7); version 2 names none
            paths |= dict.fromkeys(controllers.split(","), path)
    if controller in paths:
        top /= controller
    own = top / paths.get(controller, paths[""]).lstrip("/")
    return [own, *(parent for parent in own.parents if parent == top or top in parent.parents)]


def _words(directory: Path, *names: str) -> list[str]:
    """Of the first of these files that is there; none without one, or if it says that there is no limit."""
    for name in names:
        with contextlib.suppress(OSError):
            words = (directory / name).read_text().split()
            return [] if words[:1] in (["max"], ["-1"]) else words
    return []


def cgroup_cpus() -> float:
    """CPUs that the process's cgroup may use at once; infinite without a quota."""
    cpus = math.inf
    for directory in _cgroups("cpu"):
        if quota := _words(directory, "cpu.max", "cpu.cfs_quota_us"):
            period = quota[1] if len(quota) > 1 else _words(directory, "cpu.cfs_period_us")[0]
            cpus = min(cpus, int(quota[0]) / int(period))
    return cpus


def _memory_limits() -> Iterator[tuple[int, int]]:
    """The bytes that all processes of the process's cgroup, and of each of its parents, may use together, and those that are left. Files in
    the system's cache are left, too."""
    for directory in _cgroups("memory"):
        limit = _words(directory, "memory.max", "memory.limit_in_bytes")
        used = _words(directory, "memory.current", "memory.usage_in_bytes")
        if limit and used and int(limit[0]) < _NO_LIMIT:
            stat = _words(directory, "memory.stat")
            sizes = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
            # of version 1, children count with "total_" alone
            cached = sum(sizes.get(f"total_{kind}", sizes.get(kind, 0)) for kind in ("inactive_file", "active_file"))
            yield int(limit[0]), int(limit[0]) - int(used[0]) + cached


_NO_LIMIT = 2**62
"""bytes; version 1 says so with the largest number of pages that it can count"""


def cgroup_memory() -> float:
    """Bytes that all processes of the process's cgroup may use together; infinite without a limit."""
    return min((limit for limit, _ in _memory_limits()), default=math.inf)


def available_memory() -> int:
    """Bytes that this process can still take without swapping, within its cgroup's limit."""
    available: int = psutil.virtual_memory().available
    return max(0, min([available, *(left for _, left in _memory_limits())]))


def numa_nodes() -> dict[int, set[int]]:
    """NUMA node -> the CPUs of it that this process may use; nodes without any are left out, but there is at least one.

    >>> list(numa_nodes().values())[0] <= os.sched_getaffinity(0)
    True
    """
    allowed, nodes = os.sched_getaffinity(0), {}
    for file in Path("/sys/devices/system/node").glob("node[0-9]*/cpulist"):
        if cpus := allowed & _parse_cpulist(file.read_text()):
            nodes[int(file.parent.name.removeprefix("node"))] = cpus
    return dict(sorted(nodes.items())) or {0: allowed}


def _parse_cpulist(text: str) -> set[int]:
    """
    >>> sorted(_parse_cpulist("0-2,7"))
    [0, 1, 2, 7]
    """
    ranges = (part.partition("-") for part in text.strip().split(",") if part)
    return {number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)}


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
    """The CPU's model name."""
    return _cpu_info().get("model name", "unknown CPU")


def missing_cpu_flags(build: str = "avx512_bf16") -> list[str]:
    """Instruction sets that a build of kt-kernel needs and this CPU lacks, by /proc/cpuinfo's names. The default is the least
    build with a BF16 SFT kernel; unknown builds count as it."""
    flags = set(_cpu_info().get("flags", "").split())
    if not flags:  # /proc is hidden
        return []
    builds = list(_BUILDS)
    last = builds.index(build if build in builds else "avx512_bf16")
    wanted = [flag for name in builds[: last + 1] for flag in _BUILDS[name]]
    return [flag for flag in wanted if flag not in flags and flag.replace("_", "") not in flags]


def cache_directory() -> Path:
    """``LLAMAFACTORY_KT_CACHE``, else ``llamafactory-kt`` below ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("LLAMAFACTORY_KT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llamafactory-kt"


def gib(size: float) -> str:
    """Bytes for people.

    >>> gib(4187593113), gib(13107200), gib(5120)
    ('3.9 GiB', '12.5 MiB', '5.0 KiB')
    """
    if size < 0.1 * 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def private_cache(name: str) -> Path:
    """The cache's directory of this name, made if there is none, with the permissions 0700.

    Raises:
        OSError: It cannot be made.
    """
    root = cache_directory()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = root / name
    directory.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(OSError):  # somebody else's; an earlier version made them as the umask was
        if directory.stat().st_mode & 0o077 and directory.stat().st_uid == os.geteuid():
            directory.chmod(0o700)
    return directory
