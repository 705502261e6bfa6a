"""Measure configurations in turn, round by round. Each has its own process; only one computes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from ...ground.errors import KTConfigError, KTError
from ...ground.machine import cpu_name, usable_cores
from .configs import BASE, BenchConfig
from .results import BenchMachine, BenchReport, ConfigResult, Speed, Speeds
from .worker import check_configs, serve_config, serve_speed

_EXIT_TIMEOUT = 20.0
"""seconds"""


def bench(
    configs: Sequence[BenchConfig], prompt_tokens: Sequence[int] = (128,), new_tokens: int = 64, rounds: int = 5, *,
    parts: bool = True, loads: int = 1, checkpoint: int = 0, tick: Callable[[], object] = lambda: None,
) -> BenchReport:  # fmt: skip
    """Load all configurations, then measure them in turn; each round begins with another one. The machine's speed is measured before
    and after each prompt, and after its tokens.

    Args:
        prompt_tokens: lengths of random prompts.
        new_tokens: tokens generated after each prompt.
        parts: afterwards, also time the parts of a forward.
        loads: how often each configuration is loaded, in turn; only the last load stays.
        checkpoint: bytes of the model's checkpoint, for the report.
        tick: called after each load and each measurement.

    Raises:
        KTError: A configuration cannot be loaded; the message names it.
    """
    if changed := [config for config in configs[1:] if not config.stock and config.name != BASE]:
        with _worker("the check of all keys", check_configs, changed) as (refused, _):
            for name, reason in refused:
                raise KTConfigError(f"{name} cannot be measured: {reason}")
    seconds: dict[str, list[float]] = {config.name: [] for config in configs}
    for _ in range(loads - 1):
        for config in configs:
            with _worker(config.name, serve_config, config, tuple(prompt_tokens)) as (loaded, _):
                seconds[config.name].append(loaded.load)
            tick()
    cores = usable_cores()
    with ExitStack() as stack:
        _, measure_speed = stack.enter_context(_worker("the machine's speed", serve_speed, cores))
        measured: list[tuple[Callable[..., Any], ConfigResult]] = []
        for config in configs:
            loaded, ask = stack.enter_context(_worker(config.name, serve_config, config, tuple(prompt_tokens)))
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
                    (prefill, decode, idle), around = turn(ask, length, parts=False)
                    result.prefill.setdefault(length, []).append(prefill)
                    result.decode.setdefault(length, []).append(decode)
                    result.speeds.setdefault(length, []).append(around)
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


@contextmanager
def _worker(name: str, target: Callable[..., None], *arguments: object) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Run ``target(pipe, *arguments)`` in its own process, which is killed after an error.

    Yields:
        The first answer, and a function that sends its arguments and returns the next answer. A string is an error.
    """
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()

    def receive() -> Any:
        try:
            answer = pipe.recv()
        except EOFError:
            process.join()
            raise KTError(
                f"{name}: its process ended without a word (exit code {process.exitcode}; -9 is often the "
                "system's, for lack of memory); see its output above."
            ) from None
        if isinstance(answer, str):
            raise KTConfigError(f"{name} cannot be measured: {answer}")
        return answer

    def ask(*words: object) -> Any:
        pipe.send(words)
        return receive()

    try:
        yield receive(), ask
        pipe.close()
        process.join(_EXIT_TIMEOUT)
    finally:
        process.kill()
        process.join()
