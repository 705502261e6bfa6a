"""The process that measures plans for :mod:`.choose`: a task on standard input, and on standard output the number of each plan whose turn it
is, a line each, and in the last line the times, in JSON.

Each plan has a child process of its own: within one process, neither the number of kt-kernel's workers nor the way OpenMP's threads wait
can change. Plans are measured in turn, since the machine may be busy for a moment.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import repeat
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.nn import functional as F

from ..adapters import ExpertLora, ExpertsShape
from ..adapters.keys import PROJECTIONS
from ..checkpoint.expert_weights import ExpertBiases, ExpertWeights
from ..checkpoint.formula import ExpertFormula
from ..engines.base import Engine
from ..engines.options import EngineOptions, EngineSpec
from ..engines.plan import Plan
from ..engines.registry import get_engine
from ..ground.paging import empty_in_huge_pages
from ..ground.process import die_with_parent
from ..ground.streams import keep_stdout_clean
from ..native.fused_linear import FusedLinear
from ..native.library import library
from .choose import PlanTimes

RANK = 8
_NEAR = 1.5, 1.15
"""plans within these factors of the fastest get a second turn, and a third"""
_TOKENS = 0.3
"""seconds to decode for: tokens are slower until the scheduler has found a core for each thread"""
_PROMPTS_PART = 8
"""prompts are multiplied with one in this many of the weights around the experts, and the time is scaled"""
_SETTLE = 0.1
"""seconds until this process's threads sleep and leave the cores to the next process"""


def main() -> None:
    """Measure what standard input asks for."""
    keep_stdout_clean()  # for the result
    task = json.load(sys.stdin)
    around = _weights_around(task)
    context = multiprocessing.get_context("fork")  # imports take longer than measuring; no thread has been started yet
    pipes: list[Connection] = []
    try:
        for plan in task["plans"]:
            pipe, theirs = context.Pipe()
            context.Process(target=_serve, args=(theirs, Plan(**plan), task, around), daemon=True).start()
            theirs.close()  # so that a process that ends is noticed
            pipe.recv()  # it has loaded; one after the other, since loading may measure layouts
            pipes.append(pipe)
        measured = in_turn([partial(_ask, number, pipe) for number, pipe in enumerate(pipes, start=1)])
    except (EOFError, OSError):
        sys.exit(1)  # the child has said why
    print(json.dumps([asdict(one) for one in measured]), flush=True)


def in_turn(measure: Sequence[Callable[[], PlanTimes]]) -> list[PlanTimes]:
    """The best turn of each plan. All have one; those that may still be the fastest have more."""
    turns = [[call()] for call in measure]
    for limit in _NEAR:
        chats = [min(one.chat for one in times) for times in turns]
        near = [number for number, chat in enumerate(chats) if chat <= limit * min(chats)]
        if len(near) == 1:
            break
        for number in near:
            turns[number].append(measure[number]())
    return [min(times, key=lambda one: one.chat) for times in turns]


def _ask(number: int, pipe: Connection) -> PlanTimes:
    print(number, flush=True)
    pipe.send("your turn")
    return PlanTimes(*pipe.recv())


def _serve(pipe: Connection, plan: Plan, task: dict[str, Any], around: torch.Tensor) -> None:
    """Answer each message with (seconds of a token, seconds of a prompt of 128)."""
    die_with_parent()
    with torch.inference_mode():
        engine = _engine(plan, task)
        layer = _layer(engine, task["experts"])
        engine.arrange_process(plan)
        # Fewer experts than the model's get fewer tokens, so that each gets as many as it would there.
        prompt = max(1, 128 * task["experts"] // task["layer"][0])
        some = -(-len(around) // _PROMPTS_PART)
        for tokens in (1, prompt):
            layer(tokens, around[:some])  # what only the first calls do
        time.sleep(_SETTLE)
        pipe.send("ready")
        while pipe.recv():
            token = _token(lambda: sum(layer(1, around)))
            products, experts = layer(prompt, around[:some])
            time.sleep(_SETTLE)
            pipe.send((token, (products * len(around) / max(1, some) + experts) * 128 / prompt))


def _engine(plan: Plan, task: dict[str, Any]) -> Engine:
    """One layer with random weights and, where the engine computes it, a LoRA."""
    _, hidden, intermediate, top_k = task["layer"]
    formula = ExpertFormula(**task["formula"])
    shape = ExpertsShape(task["experts"], hidden, intermediate, formula.has_gate)

    def read(dtype: torch.dtype | None) -> Iterator[ExpertWeights]:
        one = torch.randn(intermediate, hidden).mul_(hidden**-0.5).to(torch.bfloat16)
        return repeat(ExpertWeights(one if formula.has_gate else one[:0], one, one.T), shape.num_experts)

    def read_biases() -> ExpertBiases | None:
        sizes = (shape.projection(projection)[0] for projection in PROJECTIONS)
        return ExpertBiases(*(torch.zeros(shape.num_experts, out) for out in sizes)) if formula.has_biases else None

    kind = get_engine(plan.backend).measured_as()
    _, options = kind.start(plan, EngineOptions(*task["options"]))
    rank = RANK if kind.computes_lora else 0
    engine = kind(EngineSpec(0, shape, top_k, rank, formula=formula, read_biases=read_biases), read, options)
    engine.load()
    if kind.computes_lora:
        sizes = {projection: shape.projection(projection) for projection in PROJECTIONS}
        engine.set_lora(
            ExpertLora(
                0,
                {p: torch.full((shape.num_experts, RANK, size), 0.01) for p, (_, size) in sizes.items()},
                {p: torch.full((shape.num_experts, out, RANK), 0.01) for p, (out, _) in sizes.items()},
                {p: torch.ones(shape.num_experts, RANK, dtype=torch.float64) for p in PROJECTIONS},
            )
        )
    return engine


def _weights_around(task: dict[str, Any]) -> torch.Tensor:
    """What torch multiplies with between two layers of experts. All processes read the same memory."""
    hidden, threads = task["layer"][1], torch.get_num_threads()
    torch.set_num_threads(1)  # so that none is started, which no process below this one would have
    around = empty_in_huge_pages((task["products"], hidden, hidden), torch.bfloat16)
    around.copy_(torch.randn(hidden, hidden) * hidden**-0.5)
    torch.set_num_threads(threads)
    return around


def _layer(engine: Engine, experts: int) -> Callable[[int, torch.Tensor], tuple[float, float]]:
    """What computes one layer for a number of tokens, and returns the seconds that products with the weights around it took,
    and the experts."""
    hidden, top_k = engine.spec.shape.hidden_size, engine.spec.num_experts_per_tok
    torch.manual_seed(0)
    native = not isinstance(library(), str)

    def layer(tokens: int, around: torch.Tensor) -> tuple[float, float]:
        x = torch.randn(tokens, hidden).to(torch.bfloat16)
        index = torch.rand(tokens, experts).topk(top_k).indices
        start = time.perf_counter()
        for weight in around:
            x = FusedLinear(weight)(x) if native else F.linear(x, weight)
        between = time.perf_counter()
        engine.forward(x, index, torch.full((tokens, top_k), 1 / top_k))
        return between - start, time.perf_counter() - between

    return layer


def _token(seconds: Callable[[], float]) -> float:
    """The median of as many calls as :data:`_TOKENS` has time for."""
    every: list[float] = []
    end = time.perf_counter() + _TOKENS
    while not every or time.perf_counter() < end:
        every.append(seconds())
    return statistics.median(every)


if __name__ == "__main__":
    main()
