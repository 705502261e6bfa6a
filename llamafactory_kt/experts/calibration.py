"""Measuring plans on a layer of the model's own shape, once per machine and shape.

kt-kernel's number of workers cannot change within a process and its packed weights stay for good, so the measuring is
done by a process of its own for each number of workers. The results are kept in a file that is ignored where anything
it depends on has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..adapters import ExpertsShape
from ..adapters.replacing import replacing
from ..machine import available_memory, cache_directory, cpu_name, numa_nodes, usable_cores
from .plan import Plan

logger = logging.getLogger(__name__)

SMALLEST_LAYER = 64 * 2**20
"""bytes; for smaller layers the choice matters less than the seconds that measuring takes"""
SAMPLE = 256 * 2**20
"""bytes of experts to measure with: far more than caches hold"""
PROMPT, ANSWER = 512, 256
"""tokens of the chat for which the whole time is to be least"""


@dataclass(frozen=True)
class Measured:
    """Seconds for one layer, with attention-like products between the calls."""

    decode: float
    """per token"""
    prefill: float
    """for 128 tokens"""

    @property
    def chat(self) -> float:
        """Seconds of one layer in a typical chat."""
        return self.decode * ANSWER + self.prefill * PROMPT / 128

    def __str__(self) -> str:
        return f"{self.decode * 1e3:.1f} ms a token, {self.prefill * 1e3:.0f} ms for 128"


def choose(
    plans: Sequence[Plan],
    shape: ExpertsShape,
    num_experts_per_tok: int,
    pools: int,
    max_chunk: int,
    on_gpu: bool,
    recalibrate: bool = False,
) -> tuple[Plan, str]:
    """The fastest of the plans and why, measured now or before; the first where nothing can or need be measured.

    Args:
        on_gpu: the attention is, so the experts have the CPU for themselves.
        recalibrate: measure again.
    """
    expert = 3 * shape.hidden_size * shape.intermediate_size * 2
    if len(plans) == 1:
        return plans[0], ""
    if shape.num_experts * expert < SMALLEST_LAYER:
        return plans[0], "small layers, not measured"
    experts = min(shape.num_experts, max(num_experts_per_tok, SAMPLE // expert))
    if available_memory() < 4 * experts * expert:
        return plans[0], "too little memory to measure"
    facts = {
        "machine": [cpu_name(), usable_cores(), numa_nodes(), os.environ.get("OMP_NUM_THREADS")],
        "versions": [_version(name) for name in ("llamafactory-kt-experts", "torch", "kt-kernel")],
        "layer": [shape.num_experts, shape.hidden_size, shape.intermediate_size, num_experts_per_tok, pools, max_chunk],
        "attention": not on_gpu,
        "plans": [asdict(plan) for plan in plans],
    }
    file = cache_directory() / "calibration" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
    measured = None if recalibrate else _remembered(file, facts)
    if measured is None:
        logger.info("Measuring engines and threads on a layer of this model's shape, once for this machine ...")
        try:
            measured = _measure(plans, facts, experts)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            logger.warning("Measuring engines and threads failed (%s); using %s.", error, plans[0])
            return plans[0], "measuring failed"
        _remember(file, facts, measured)
    best = min(range(len(plans)), key=lambda number: measured[number].chat)
    others = "; ".join(f"{plan} {measured[number]}" for number, plan in enumerate(plans) if number != best)
    return plans[best], f"measured {measured[best]} per layer; {others}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _remembered(file: Path, facts: dict[str, Any]) -> list[Measured] | None:
    try:
        content = json.loads(file.read_text())
        if content["facts"] != facts or len(content["measured"]) != len(facts["plans"]):
            return None
        found = [Measured(float(one["decode"]), float(one["prefill"])) for one in content["measured"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if all(0 < one.decode < 1e3 and 0 < one.prefill < 1e3 for one in found) else None


def _remember(file: Path, facts: dict[str, Any], measured: Sequence[Measured]) -> None:
    try:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps({"facts": facts, "measured": [asdict(one) for one in measured]}, indent=1))
    except OSError as error:
        logger.warning("The measured times could not be kept in %s (%s); the next load measures again.", file, error)


def _measure(plans: Sequence[Plan], facts: dict[str, Any], experts: int) -> list[Measured]:
    """One process for each number of workers; engines without workers go with the first."""
    counts = sorted({plan.workers for plan in plans if plan.workers}) or [0]
    found: dict[int, Measured] = {}
    for count in counts:
        mine = [n for n, plan in enumerate(plans) if plan.workers == count or (not plan.workers and count == counts[0])]
        task = {
            "layer": facts["layer"],
            "attention": facts["attention"],
            "experts": experts,
            "plans": [facts["plans"][number] for number in mine],
        }
        done = subprocess.run(
            [sys.executable, "-m", "llamafactory_kt.experts.calibrate"], input=json.dumps(task), text=True,
            capture_output=True, timeout=180, check=False,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"the measuring process ended with {done.returncode}: {last}")
        results = json.loads(done.stdout.strip().splitlines()[-1])
        found.update({number: Measured(**result) for number, result in zip(mine, results, strict=True)})
    return [found[number] for number in range(len(plans))]
