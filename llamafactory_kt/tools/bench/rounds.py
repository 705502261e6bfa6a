"""Configurations measured in turn, round by round: each in a process of its own, of which one computes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import Any

from ...ground.errors import KTConfigError, KTError
from ...ground.machine import cpu_name, usable_cores
from .bandwidth import serve_bandwidth
from .figures import Loaded, Machine, Measured, Report
from .process import check, serve
from .rows import BASE, Row

_GOODBYE = 20.0
"""seconds a process may take to end"""


def bench(
    rows: Sequence[Row],
    prompt_tokens: Sequence[int] = (128,),
    new_tokens: int = 64,
    rounds: int = 5,
    *,
    loads: int = 1,
    checkpoint: int = 0,
    tick: Callable[[], object] = lambda: None,
) -> Report:
    """Load all configurations, then measure them in turn; each round begins with another one.

    Args:
        prompt_tokens: lengths of random prompts.
        new_tokens: tokens generated after each.
        loads: how often each is loaded, in turn; only the last ones stay.
        checkpoint: bytes of the model's checkpoint, for the report.
        tick: called after each load and each measurement.

    Raises:
        KTError: A configuration cannot be loaded; the message names it.
    """
    if changed := [row for row in rows[1:] if not row.stock and row.name != BASE]:
        with _Process.running("the check of all keys", check, changed) as process:
            for name, reason in process.hello:
                raise KTConfigError(f"{name} cannot be measured: {reason}")
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(loads - 1):
        for row in rows:
            with _Process.running(row.name, serve, row, tuple(prompt_tokens)) as process:
                seconds[row.name].append(process.hello.load)
            tick()
    cores = usable_cores()
    with ExitStack() as stack:
        reader = stack.enter_context(_Process.running("memory bandwidth", serve_bandwidth, cores))
        measured: list[tuple[_Process, Measured]] = []
        for row in rows:
            process = stack.enter_context(_Process.running(row.name, serve, row, tuple(prompt_tokens)))
            loaded: Loaded = process.hello
            measured.append((process, Measured(row.name, loaded, [*seconds[row.name], loaded.load])))
            tick()
        bandwidth: list[float] = []
        for number in range(rounds):
            bandwidth.append(reader.ask())
            first = number % len(measured)
            for length in prompt_tokens:
                for process, one in measured[first:] + measured[:first]:
                    prefill, decode, idle = process.ask(length, new_tokens)
                    one.prefill.setdefault(length, []).append(prefill)
                    one.decode.setdefault(length, []).append(decode)
                    if idle is not None:
                        one.idle.append(idle)
                    tick()
        for process, one in measured:
            one.peak, one.gpu_memory = process.ask("end")
    return Report(Machine(cpu_name(), cores, bandwidth, checkpoint), [one for _, one in measured])


class _Process:
    """A process that answers over a pipe: once when it is ready, then each question. A string is an error."""

    def __init__(self, name: str, target: Callable[..., None], *arguments: object):
        context = get_context("spawn")
        self._name = name
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    @classmethod
    @contextmanager
    def running(cls, name: str, target: Callable[..., None], *arguments: object) -> Iterator[_Process]:
        """The process, ready; it ends when nobody asks any more, and is killed where something went wrong."""
        process = cls(name, target, *arguments)
        try:
            process.hello = process._receive()
            yield process
            process._pipe.close()
            process.process.join(_GOODBYE)
        finally:
            process.process.kill()
            process.process.join()

    hello: Any
    """its first answer"""

    def ask(self, *words: object) -> Any:
        self._pipe.send(words)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self.process.join()
            raise KTError(
                f"{self._name}: its process ended without a word (exit code {self.process.exitcode}; -9 is often the "
                "system's, for lack of memory); see its output above."
            ) from None
        if isinstance(answer, str):
            raise KTConfigError(f"{self._name} cannot be measured: {answer}")
        return answer
