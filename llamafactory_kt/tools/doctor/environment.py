"""Environment variables that get in the way."""

from __future__ import annotations

import os

from ...ground.machine import usable_cores
from .finding import Findings, error, ok, warning


def variables() -> Findings:
    """OpenMP's, torch's, LLaMA-Factory's and our own variables, as far as they are set."""
    seen = 0
    for finding in (*_switches(), *_openmp()):
        seen += 1
        yield finding
    if not seen:
        yield ok("environment", "no variable is set that gets in the way")


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false")


def _switches() -> Findings:
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        yield error(
            "TORCH_DEVICE_BACKEND_AUTOLOAD", "0: torch calls no extension, this one included",
            "Unset it. Python programs may call llamafactory_kt.activate() instead.",
        )  # fmt: skip
    if _on("LLAMAFACTORY_KT_DISABLE"):
        yield error("LLAMAFACTORY_KT_DISABLE", "set: nothing is hooked", "Unset it.")
    if _on("USE_V1"):
        yield error("USE_V1", "set: LLaMA-Factory's rewrite is used, which is not hooked", "Unset it.")
    if variant := os.environ.get("KT_KERNEL_CPU_VARIANT"):
        yield warning(
            "KT_KERNEL_CPU_VARIANT", f"{variant}: forces one of kt-kernel's builds",
            "Unset it, unless the automatic choice is wrong.",
        )  # fmt: skip


def _openmp() -> Findings:
    cores = usable_cores()
    for name in sorted(os.environ):
        value = os.environ[name]
        if name == "OMP_NUM_THREADS":
            first = value.split(",")[0].strip()
            if not first.isdecimal():
                yield warning(name, f"{value!r} is no number", "Unset it.")
            elif int(first) > cores:
                yield warning(
                    name, f"{value}: more than the {cores} physical cores that this process may use", "Unset it."
                )
            else:
                yield ok(name, f"{value}: torch's own threads; kt-kernel's workers come on top")
        elif name in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"):
            if value.lower() != "false":
                yield warning(
                    name, f"{value}: OpenMP binds the process to its first place, and kt-kernel's workers start there too",
                    "Unset it; bind the whole process with taskset or numactl instead.",
                )  # fmt: skip
        elif (name == "OMP_WAIT_POLICY" and value.lower() == "active") or (
            name == "GOMP_SPINCOUNT" and value.lower() not in ("0", "")
        ):
            yield warning(
                name, f"{value}: torch's threads spin and take the cores of kt-kernel's workers",
                "Unset it, or OMP_WAIT_POLICY=PASSIVE.",
            )  # fmt: skip
        elif name.startswith("KMP_"):
            yield warning(
                name, f"{value}: read by Intel's OpenMP only; torch from PyPI comes with GNU's",
                "Unset it; it has no effect here.",
            )  # fmt: skip
        elif name.startswith(("OMP_", "GOMP_")):
            yield ok(name, value)
