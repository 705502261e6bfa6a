"""Measure configurations in turn, round by round. Each has its own process; only one computes at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ...ground.machine import cpu_name, usable_cores
from .configs import BASE, BenchConfig
from .processes import refuse_wrong_keys, worker
from .results import BenchMachine, BenchReport, ConfigResult, Speeds
from .speed import Speed, serve_speed
from .worker import serve_config


def bench(
    configs: Sequence[BenchConfig], prompt_tokens: Sequence[int] = (128,), new_tokens: int = 64, rounds: int = 5, *,
    parts: bool = True, loads: int = 1, checkpoint: int = 0, seed: int = 0, tick: Callable[[], object] = lambda: None,
) -> BenchReport:  # fmt: skip
    """Load all configurations, then measure them in turn; each round begins with another one. The machine's speed is measured before
    and after each prompt, and after its tokens.

    Args:
        prompt_tokens: lengths of random prompts.
        new_tokens: tokens generated after each prompt.
        parts: afterwards, also time the parts of a forward.
        loads: how often each configuration is loaded, in turn; only the last load stays.
        checkpoint: bytes of the model's checkpoint, for the report.
        seed: of the random prompts.
        tick: called after each load and each measurement.

    Raises:
        KTError: A configuration cannot be loaded; the message names it.
    """
    refuse_wrong_keys([config for config in configs[1:] if not config.stock and config.name != BASE])
    seconds: dict[str, list[float]] = {config.name: [] for config in configs}
    for _ in range(loads - 1):
        for config in configs:
            with worker(config.name, serve_config, config, tuple(prompt_tokens), seed) as (loaded, _):
                seconds[config.name].append(loaded.load)
            tick()
    cores = usable_cores()
    with ExitStack() as stack:
        _, measure_speed = stack.enter_context(worker("the machine's speed", serve_speed, cores))
        measured: list[tuple[Callable[..., Any], ConfigResult]] = []
        for config in configs:
            loaded, ask = stack.enter_context(worker(config.name, serve_config, config, tuple(prompt_tokens), seed))
            measured.append((ask, ConfigResult(config.name, loaded, [*seconds[config.name], loaded.load])))
            tick()
        speeds: list[Speed] = [measure_speed()]

        def turn(ask: Callable[..., Any], length: int, parts: bool) -> tuple[Any, Speeds]:
            """The answer, and the speed around it; one turn's last speed is the next one's first."""
            ask(length, new_tokens, parts)
            speeds.append(measure_speed())
            answer = ask("go on")
            speeds.append(measure_speed())
            tick()
            return answer, Speeds(*speeds[-3:])

        for number in range(rounds):
            first = number % len(measured)
            for length in prompt_tokens:
                for ask, result in measured[first:] + measured[:first]:
                    (prefill, decode, idle, again), around = turn(ask, length, parts=False)
                    result.prefill.setdefault(length, []).append(prefill)
                    result.decode.setdefault(length, []).append(decode)
                    result.speeds.setdefault(length, []).append(around)
                    if again is not None:
                        result.turns.setdefault(length, []).append(again)
                    if idle is not None:
                        result.idle.append(idle)
        for length in prompt_tokens if parts else ():
            for ask, result in measured:
                found, around = turn(ask, length, parts=True)
                result.parts[length] = replace(found, speeds=around)
        for ask, result in measured:
            result.peak, result.gpu_memory, result.resident, result.proportional = ask("end")
    reads, products = ([getattr(speed, kind) for speed in speeds] for kind in ("reads", "products"))
    return BenchReport(BenchMachine(cpu_name(), cores, reads, checkpoint, products), [result for _, result in measured])
