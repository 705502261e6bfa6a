"""CPU, memory, disk, GPU, and which engines run on them."""

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
from .finding import Findings, ok, warning

LITTLE_MEMORY = 2 * 2**30
"""Python with torch and LLaMA-Factory takes about one gibibyte before any model"""
LITTLE_DISK = 2**30


def cpu() -> Findings:
    """Model, instruction sets, cores, NUMA nodes."""
    missing = missing_cpu_flags()
    if missing:
        yield warning(
            "CPU", f"{cpu_name()}: lacks {', '.join(missing)}, which kt-kernel's BF16 kernel needs",
            "kt_backend: auto takes an engine that does without. In a virtual machine the host may hide the instructions.",
        )  # fmt: skip
    else:
        amx = not any(flag in AMX_FLAGS for flag in missing_cpu_flags("amx"))
        yield ok("CPU", f"{cpu_name()}: AVX-512 BF16{' and AMX' if amx else ', no AMX'}")
    quota = cgroup_cpus()
    limit = "" if math.isinf(quota) else f", cgroup quota {quota:g} CPUs"
    text = f"{usable_cores()} physical, of {os.cpu_count()} CPUs{limit}; {len(numa_nodes())} NUMA node(s)"
    if usable_cores() < 2:
        yield warning("cores", text, "kt-kernel's workers and torch share one core; give the process more.")
    else:
        yield ok("cores", text)


def memory() -> Findings:
    """What is free, within the cgroup's limit."""
    free, limit = available_memory(), cgroup_memory()
    text = f"{gib(free)} free{'' if math.isinf(limit) else f', cgroup limit {gib(limit)}'}"
    if free < LITTLE_MEMORY:
        yield warning("memory", text, "Free memory, or raise the container's limit.")
    else:
        yield ok("memory", text)


def disk() -> Findings:
    """Room where hub models and temporary files go."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    for subject, place in (
        ("disk, hub cache", Path(hub).expanduser()),
        ("disk, temporary", Path(tempfile.gettempdir())),
    ):
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < LITTLE_DISK:
            yield warning(subject, f"{gib(free)} free at {place}", "Free space, or point HF_HOME (TMPDIR) elsewhere.")
        else:
            yield ok(subject, f"{gib(free)} free at {place}")


def gpu() -> Findings:
    """GPUs that torch sees, against those that the driver has."""
    import torch

    listed = _nvidia_smi()
    if torch.cuda.is_available():
        driver = f", driver {listed[0][1]}" if listed else ""
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            yield ok(
                f"GPU {number}",
                f"{torch.cuda.get_device_name(number)}: {gib(free)} of {gib(total)} free{driver}, CUDA {torch.version.cuda}",
            )
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
    """(name, driver version) of each GPU; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in result.stdout.splitlines() if "," in line]
    return [(name.strip(), driver.strip()) for name, _, driver in rows]


def engines() -> Findings:
    """Which engines run here, with their builds, and which of those that ``auto`` considers do not."""
    from ...engines.registry import engines as every

    running = [engine for engine in every() if engine.problem() is None]
    builds = dict.fromkeys(engine.build() for engine in running)
    text = "; ".join(
        ", ".join(engine.name for engine in running if engine.build() == build) + (f" (build {build})" if build else "")
        for build in builds
    )
    missing = [engine for engine in every() if engine.auto(merged=False) and engine not in running]
    if not missing:
        yield ok("engines", text)
        return
    reasons = "; ".join(f"no {engine.name}: {engine.problem()}" for engine in missing)
    yield warning(
        "engines", f"{text}; {reasons}",
        "kt_backend: auto takes the fastest of the engines that run here; asking for one that does not is an error.",
    )  # fmt: skip
