"""Processes in which configurations are loaded and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from ...ground.errors import KTConfigError, KTError
from .configs import BenchConfig
from .worker import check_configs

_EXIT_TIMEOUT = 20.0
"""seconds"""


@contextmanager
def worker(name: str, target: Callable[..., None], *arguments: object) -> Iterator[tuple[Any, Callable[..., Any]]]:
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


def refuse_wrong_keys(configs: Sequence[BenchConfig]) -> None:
    """Check the keys of configurations before anything is loaded.

    Raises:
        KTConfigError: Keys are refused; the message names the configuration.
    """
    if configs:
        with worker("the check of all keys", check_configs, configs) as (refused, _):
            for name, reason in refused:
                raise KTConfigError(f"{name} cannot be measured: {reason}")
