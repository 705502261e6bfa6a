"""Generations and the exchange of adapters keep out of each other's way."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

from ..ground.process import require_own_process
from ..matmul.openmp import release_team
from . import router_counts
from .debug import Debugger

Observer = Callable[[dict[str, Any]], contextlib.AbstractContextManager[Any]]
"""Given a call's arguments by name: what surrounds the call"""


class Gate:
    """Many generations at once, or one exchange alone. An exchange that waits goes before generations that come later.

    The standard library has no such lock.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting = 0
        self._exchanging = False
        self._inside = threading.local()

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """Hold the model as it is. A thread may enter again while it is inside: ``generate`` calls ``forward``.

        Raises:
            KTKernelError: The process was forked from the model's.
        """
        require_own_process()
        depth = getattr(self._inside, "depth", 0)
        if depth == 0:
            with self._changed:
                self._changed.wait_for(lambda: not self._exchanging and not self._waiting)
                self._running += 1
        self._inside.depth = depth + 1
        try:
            yield
        finally:
            self._inside.depth = depth
            if depth == 0:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

    def wait_until_idle(self) -> None:
        """Return when no generation runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Have the model alone; waits for generations that run.

        Raises:
            RuntimeError: The calling thread is generating, and would wait for itself.
            KTKernelError: As in :meth:`generation`.
        """
        require_own_process()
        if getattr(self._inside, "depth", 0):
            raise RuntimeError("The model cannot be changed from within a generation.")
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._exchanging and not self._running)
                self._exchanging = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        self._inside.depth = 1  # this thread may use the model itself
        try:
            yield
        finally:
            release_team()
            self._inside.depth = 0
            with self._changed:
                self._exchanging = False
                self._changed.notify_all()


@contextlib.contextmanager
def _own_team(_: dict[str, Any]) -> Iterator[None]:
    """Torch's threads wait for the next product as long as a generation runs, and no longer."""
    try:
        yield
    finally:
        release_team()


def guard(model: nn.Module, observe: bool = False, debugger: Debugger | None = None) -> Gate:
    """Let the model's ``generate`` and ``forward`` pass through a gate of its own, also where PEFT wraps the model.

    Args:
        observe: note what each call is about, for the layers' :class:`RouterCounts`.
        debugger: follows each call of ``forward``.
    """
    gate, reference = Gate(), weakref.ref(model)  # no cycle: a dropped model gives its memory back at once
    observers: dict[str, list[Observer]] = {"generate": [_own_team], "forward": []}
    if observe:
        observers["generate"].append(lambda kwargs: router_counts.generation(reference(), kwargs))
        observers["forward"].append(router_counts.call)
    if debugger is not None:
        observers["forward"].append(debugger.step)

    def through(stock: Callable[..., Any], observers: list[Observer]) -> MethodType:
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def call(_: Any, *args: Any, **kwargs: Any) -> Any:
            with gate.generation(), contextlib.ExitStack() as notes:
                if observers:
                    by_name = {**signature.bind_partial(None, *args).arguments, **kwargs} if args else kwargs
                    for observer in observers:
                        notes.enter_context(observer(by_name))
                return stock(reference(), *args, **kwargs)

        return MethodType(call, weakref.proxy(model))  # LLaMA-Factory and transformers look into the method

    for name in observers:
        if stock := getattr(type(model), name, None):
            setattr(model, name, through(stock, observers[name]))
    return gate
