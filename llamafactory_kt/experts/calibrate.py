"""The process that measures plans for :mod:`.calibration`: a task on standard input, times on standard output, in JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ..adapters import ExpertLora, ExpertsShape
from ..adapters.keys import PROJECTIONS
from .engine import Engine, EngineSpec
from .kt_engine import KTEngine
from .kt_runtime import settle_pool
from .layer_tensors import LayerWeights
from .methods import METHODS
from .onednn_engine import OneDNNEngine
from .plan import Plan
from .workers import arrange

RANK = 8


def main() -> None:
    """Measure what standard input asks for."""
    task = json.load(sys.stdin)
    plans = [Plan(**plan) for plan in task["plans"]]
    results, engines = [], dict[str, Engine]()
    with torch.inference_mode():
        for plan in plans:
            if plan.workers:
                settle_pool(plan.workers, task["layer"][4])
            if plan.backend not in engines:
                engines[plan.backend] = _engine(plan, task)
            arrange(plan)
            results.append(_times(engines[plan.backend], task))
    print(json.dumps(results), flush=True)


def _engine(plan: Plan, task: dict[str, Any]) -> Engine:
    """One layer with random weights and a LoRA."""
    _, hidden, intermediate, top_k, pools, max_chunk = task["layer"]
    shape = ExpertsShape(task["experts"], hidden, intermediate)

    def read(dtype: torch.dtype | None, padded: tuple[int, int]) -> LayerWeights:
        one = torch.randn(padded[1], padded[0]).mul_(padded[0] ** -0.5).to(torch.bfloat16)
        every = one.expand(shape.num_experts, *one.shape)
        return LayerWeights(every.clone(), every.clone(), every.transpose(1, 2).contiguous())

    spec = EngineSpec(0, shape, top_k, RANK)
    # AMXINT8 takes files only; for sharing the cores, its kernel is like the other integers'.
    method = METHODS["AMXINT4"] if plan.backend == "AMXINT8" else plan.method
    engine: Engine = (
        KTEngine(spec, read, method, max_chunk=max_chunk, pools=pools, verbose=False)
        if method
        else OneDNNEngine(spec, read)
    )
    engine.load()
    if method is not None and not method.lora:
        return engine
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


def _times(engine: Engine, task: dict[str, Any]) -> dict[str, float]:
    """Seconds a token, and for a prompt of 128."""
    every, hidden, _, top_k, *_ = task["layer"]
    experts = task["experts"]
    torch.manual_seed(0)
    count = 3 if task["attention"] else 0
    attention = [torch.randn(hidden, hidden).mul_(hidden**-0.5).to(torch.bfloat16) for _ in range(count)]

    def layer(tokens: int) -> None:
        x = torch.randn(tokens, hidden).to(torch.bfloat16)
        index = torch.rand(tokens, experts).topk(top_k).indices
        for weight in attention:
            x = F.linear(x, weight)
        engine.forward(x, index, torch.full((tokens, top_k), 1 / top_k))

    # Fewer experts than the model's get fewer tokens, so that each gets as many as it would there.
    tokens = max(1, 128 * experts // every)
    return {"decode": _median(lambda: layer(1), 40), "prefill": _median(lambda: layer(tokens), 5) * 128 / tokens}


def _median(call: Callable[[], None], times: int) -> float:
    for _ in range(2):
        call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[times // 2]


if __name__ == "__main__":
    main()
