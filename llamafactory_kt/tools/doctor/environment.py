"""Environment variables that interfere."""

from __future__ import annotations

import os

from ...ground.machine import usable_cores
from .finding import Findings, error, ok, warning

_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


def variables() -> Findings:
    """Check the variables of OpenMP, torch, LLaMA-Factory and this package that are set."""
    findings = [*_switches(), *_openmp()]
    yield from findings or [ok("environment", "no variable is set that gets in the way")]


def _switches() -> Findings:
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        yield error(
            "TORCH_DEVICE_BACKEND_AUTOLOAD", "0: torch calls no extension, this one included",
            "Unset it. Python programs may call llamafactory_kt.activate() instead.",
        )  # fmt: skip
    for name, effect in (
        ("LLAMAFACTORY_KT_DISABLE", "nothing is hooked"),
        ("USE_V1", "LLaMA-Factory's rewrite is used, which is not hooked"),
    ):
        if os.environ.get(name, "").lower() not in ("", "0", "false"):
            yield error(name, f"set: {effect}", "Unset it.")
    if variant := os.environ.get("KT_KERNEL_CPU_VARIANT"):
        text = f"{variant}: forces one of kt-kernel's builds"
        yield warning("KT_KERNEL_CPU_VARIANT", text, "Unset it, unless the automatic choice is wrong.")


def _openmp() -> Findings:
    cores = usable_cores()
    for name, value in sorted(os.environ.items()):
        lower = value.lower()
        if name == "OMP_NUM_THREADS":
            first = value.split(",")[0].strip()
            if not first.isdecimal():
                yield warning(name, f"{value!r} is no number", "Unset it.")
            elif int(first) > cores:
                text = f"{value}: more than the {cores} physical cores that this process may use"
                yield warning(name, text, "Unset it.")
            else:
                yield ok(name, f"{value}: torch's own threads; kt-kernel's workers come on top")
        elif name in _BINDING:
            if lower != "false":
                text = f"{value}: OpenMP binds the process to its first place, and kt-kernel's workers start there too"
                yield warning(name, text, "Unset it; bind the whole process with taskset or numactl instead.")
        elif (name, lower) == ("OMP_WAIT_POLICY", "active") or (name == "GOMP_SPINCOUNT" and lower not in ("0", "")):
            text = f"{value}: torch's threads spin and take the cores of kt-kernel's workers"
            yield warning(name, text, "Unset it, or set OMP_WAIT_POLICY=PASSIVE.")
        elif name.startswith("KMP_"):
            text = f"{value}: read by Intel's OpenMP only; torch from PyPI comes with GNU's"
            yield warning(name, text, "Unset it; it has no effect here.")
        elif name.startswith(("OMP_", "GOMP_")):
            yield ok(name, value)
