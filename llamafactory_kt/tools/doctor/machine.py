"""CPU, memory, disk, GPUs, and the engines that run on them."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ...ground.machine import (
    AMX_FLAGS,
    available_memory,
    cgroup_cpus,
    cgroup_memory,
    cpu_name,
    gib,
    missing_cpu_flags,
    numa_nodes,
    usable_cores,
)
from ...ground.paging import is_refused, spread_over
from .finding import Findings, ok, warning

LITTLE_MEMORY = 2 * 2**30
"""bytes; Python, torch and LLaMA-Factory need part of it before any model"""
LITTLE_DISK = 2**30
"""bytes"""


def cpu() -> Findings:
    """Check model, instruction sets, cores and NUMA nodes."""
    if missing := missing_cpu_flags():
        yield ok("CPU", f"{cpu_name()}: lacks {', '.join(missing)}, which kt-kernel's BF16 kernel alone needs")
    else:
        amx = not any(flag in AMX_FLAGS for flag in missing_cpu_flags("amx"))
        yield ok("CPU", f"{cpu_name()}: AVX-512 BF16{' and AMX' if amx else ', no AMX'}")
    quota, cores = cgroup_cpus(), usable_cores()
    limit = "" if math.isinf(quota) else f", cgroup quota {quota:g} CPUs"
    text = f"{cores} physical, of {os.cpu_count()} CPUs{limit}; {len(numa_nodes())} NUMA node(s)"
    advice = "kt-kernel's workers and torch share one core; give the process more cores."
    yield warning("cores", text, advice) if cores < 2 else ok("cores", text)


def memory() -> Findings:
    """Check free memory, within the cgroup's limit."""
    free, limit = available_memory(), cgroup_memory()
    text = f"{gib(free)} free{'' if math.isinf(limit) else f', cgroup limit {gib(limit)}'}"
    advice = "Free memory, or raise the container's limit."
    yield warning("memory", text, advice) if free < LITTLE_MEMORY else ok("memory", text)


def numa() -> Findings:
    """On several NUMA nodes, say where copied weights would lie."""
    nodes = list(numa_nodes())
    if len(nodes) > 1:
        names = f"nodes {', '.join(map(str, nodes))}"
        if is_refused():
            yield warning(
                "NUMA", f"{names}; the system does not let this process choose one, so one node's memory will carry all copied weights",
                "Give the container the capability SYS_NICE (docker run --cap-add SYS_NICE).",
            )  # fmt: skip
        else:
            way = "take turns over them" if spread_over() else "lie as the process's memory policy says (numactl)"
            yield ok("NUMA", f"{names}; the pages of copied weights {way}")


def disk() -> Findings:
    """Check free space for hub models and for temporary files."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    for subject, path in (("disk, hub cache", hub), ("disk, temporary", tempfile.gettempdir())):
        place = Path(path).expanduser()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        text, advice = f"{gib(free)} free at {place}", "Free space, or point HF_HOME (TMPDIR) elsewhere."
        yield warning(subject, text, advice) if free < LITTLE_DISK else ok(subject, text)


def gpu() -> Findings:
    """Compare the GPUs that torch sees with those that the driver has."""
    import torch

    listed = _nvidia_smi()
    if torch.cuda.is_available():
        driver = f", driver {listed[0][1]}" if listed else ""
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            text = f"{name}: {gib(free)} of {gib(total)} free{driver}, CUDA {torch.version.cuda}"
            yield ok(f"GPU {number}", text)
    elif not listed:
        yield ok("GPU", "none; everything runs on the CPU")
    elif os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        yield warning("GPU", f"{listed[0][0]}, hidden by CUDA_VISIBLE_DEVICES", "Unset it to use the GPU.")
    else:
        yield warning(
            "GPU", f"{listed[0][0]} with driver {listed[0][1]}, which torch {torch.__version__} cannot use",
            f"Install a driver for CUDA {torch.version.cuda}, or a torch with CUDA; until then all runs on the CPU.",
        )  # fmt: skip


def _nvidia_smi() -> list[tuple[str, str]]:
    """(name, driver version) of each GPU; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in result.stdout.splitlines() if "," in line]
    return [(name.strip(), driver.strip()) for name, _, driver in rows]


def native_kernels() -> Findings:
    """Say which instruction set the native kernels use, or why there are none."""
    from ...native.library import VARIABLE, library

    found = library()
    if isinstance(found, str):
        yield warning(
            "native kernels", found,
            f"If they were not built, install a C++ compiler (g++ or clang++) and install the package again; if {VARIABLE} is set, unset "
            "it. Until then experts take another engine, and the layers around them PyTorch's operators.",
        )  # fmt: skip
        return
    chosen = f", chosen by {VARIABLE}" if os.environ.get(VARIABLE) else ""
    sets = found.kt_instruction_sets().decode().replace(",", ", ")
    yield ok("native kernels", f"{found.kt_in_use().decode()}{chosen}; this CPU has {sets}")


def engines() -> Findings:
    """List the engines that run here, with their builds, and those of ``auto`` that do not."""
    from ...engines.registry import engines as every

    running = [engine for engine in every() if engine.problem() is None]
    builds: dict[str, list[str]] = {}
    for engine in running:
        builds.setdefault(engine.build(), []).append(engine.name)
    text = "; ".join(", ".join(names) + (f" (build {build})" if build else "") for build, names in builds.items())
    missing = [engine for engine in every() if engine.auto(merged=False) and engine not in running]
    if not missing:
        yield ok("engines", text)
        return
    reasons = "; ".join(f"no {engine.name}: {engine.problem()}" for engine in missing)
    yield warning(
        "engines", f"{text}; {reasons}",
        "kt_backend: auto takes the fastest of the engines that run here; asking for one that does not is an error.",
    )  # fmt: skip
