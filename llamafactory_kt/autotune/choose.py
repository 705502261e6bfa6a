"""Choosing among plans: each is measured on a layer of the model's shape, once per machine and shape.

The plan with the lowest total time for a 512-token prompt and a 256-token answer wins.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from threading import Timer
from typing import Any, NamedTuple

from ..adapters import ExpertsShape
from ..checkpoint.formula import PLAIN, ExpertFormula
from ..engines.options import EngineOptions
from ..engines.plan import Plan
from ..ground.machine import available_memory
from ..ground.measurements import BUSY, Remembered, load_of_cores
from ..ground.progress import measuring

logger = logging.getLogger(__name__)

SMALLEST_LAYER = 64 * 2**20
"""bytes; smaller layers are not worth the seconds that measuring takes"""
SAMPLE = 256 * 2**20
"""bytes of experts to measure with, far more than caches hold"""
PROCESS = 2**29
"""bytes of a measuring process besides the experts"""
AROUND = 512 * 2**20
"""most bytes of the weights around the experts, which all processes share"""
TIMEOUT = 180
"""seconds for all plans together"""
PROMPT, ANSWER = 512, 256
"""tokens of a typical chat"""


@dataclass(frozen=True)
class PlanTimes:
    """Seconds for one layer, with products as large as those around the experts in between."""

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
    options: EngineOptions,
    around: int,
    recalibrate: bool = False,
    formula: ExpertFormula = PLAIN,
) -> tuple[Plan, str]:
    """The fastest plan and why it was chosen; the first plan where nothing can be measured, or need be.

    Args:
        around: bytes of other weights that PyTorch reads on the CPU for each layer of experts; 0 where a GPU has them, so that the
            experts have the CPU to themselves.
        recalibrate: measure again.
        formula: what each expert computes.
    """
    expert = 2 * shape.num_weights // shape.num_experts
    if len(plans) == 1:
        return plans[0], ""
    if shape.num_experts * expert < SMALLEST_LAYER:
        return plans[0], "small layers, not measured"
    experts = min(shape.num_experts, max(num_experts_per_tok, SAMPLE // expert))
    product = 2 * shape.hidden_size**2
    products = max(1, round(min(around, AROUND) / product)) if around else 0
    if available_memory() < len(plans) * (PROCESS + 2 * experts * expert) + products * product:
        return plans[0], "too little memory to measure"
    memory = Remembered(
        {
            "layer": [shape.num_experts, shape.hidden_size, shape.intermediate_size, num_experts_per_tok],
            "formula": asdict(formula),
            "options": [options.pools, options.max_chunk],
            "products": products,
            "plans": [asdict(plan) for plan in plans],
            "kept": 2,  # the form of what is kept
        }
    )  # fmt: skip
    if recalibrate:
        memory.forget()
    load = load_of_cores()
    found = memory.recall(lambda kept: _Measured(_checked(kept["plans"], len(plans)), float(kept["load"])))
    if found is None or found.load > BUSY >= load:
        logger.info("Measuring engines and threads on a layer of this model's shape, once for this machine ...")
        try:
            found = _Measured(_measure(memory.facts, experts), load)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            logger.warning("Measuring engines and threads failed (%s); using %s.", error, plans[0])
            return plans[0], "measuring failed"
        memory.keep({"plans": [asdict(one) for one in found.plans], "load": load})
    times = found.plans
    best = min(range(len(plans)), key=lambda number: times[number].chat)
    others = "; ".join(f"{plan} {times[number]}" for number, plan in enumerate(plans) if number != best)
    busy = " (while other programs kept the machine busy; measured again at the next load, if it is idle)"
    return plans[best], f"measured {times[best]} per layer; {others}{busy if found.load > BUSY else ''}"


class _Measured(NamedTuple):
    plans: list[PlanTimes]
    load: float
    """of the machine before, for each core"""


def _checked(measured: Any, count: int) -> list[PlanTimes]:
    """What was kept, where it makes sense; else ValueError, or what reading it raises."""
    found = [PlanTimes(float(one["decode"]), float(one["prefill"])) for one in measured]
    if len(found) != count or not all(0 < one.decode < 1e3 and 0 < one.prefill < 1e3 for one in found):
        raise ValueError("not the times of these plans")
    return found


def _measure(facts: dict[str, Any], experts: int) -> list[PlanTimes]:
    command = [sys.executable, "-m", "llamafactory_kt.autotune.worker"]
    plans, last = len(facts["plans"]), ""
    with tempfile.TemporaryFile("w+") as said, measuring(plans) as tell:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        timer = Timer(TIMEOUT, process.kill)
        timer.start()
        try:
            with process, contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps({**facts, "experts": experts}))  # type: ignore[union-attr]
                process.stdin.close()  # type: ignore[union-attr]
                for last in process.stdout or ():
                    if last.strip().isdecimal():
                        tell(int(last))
        finally:
            timer.cancel()
            process.kill()
        if process.returncode:
            said.seek(0)
            reason = ([line for line in said.read().splitlines() if line.strip()] or ["no message"])[-1].strip()
            raise ValueError(f"the measuring process ended with {process.returncode}: {reason}")
    return [PlanTimes(**result) for result in json.loads(last)]
