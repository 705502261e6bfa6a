"""A model's ``generate`` and ``forward`` hold its lock, and are observed where somebody wants to know."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..ground.errors import KTModelError
from ..native.mapped import MappedFile
from ..native.on_host import raise_failure
from ..native.openmp import release_team
from . import router_counts
from .debug import Debugger
from .lock import ModelLock
from .on_gpu.placement import Placement

Observer = Callable[[dict[str, Any]], contextlib.AbstractContextManager[Any]]
"""Given a call's arguments by name: what surrounds the call"""


@contextlib.contextmanager
def _own_team(_: dict[str, Any]) -> Iterator[None]:
    """PyTorch's threads spin between kernels only while a generation runs."""
    try:
        yield
    finally:
        release_team()


@contextlib.contextmanager
def _no_failure(_: dict[str, Any]) -> Iterator[None]:
    """What a GPU's stream computed without Python has succeeded. The answer has been read, so the stream is done."""
    yield
    raise_failure()


@contextlib.contextmanager
def _unchanged(files: Sequence[MappedFile]) -> Iterator[None]:
    """No answer comes of weights that somebody has changed meanwhile."""
    yield
    for file in files:
        if problem := file.problem():
            raise KTModelError(problem)


@contextlib.contextmanager
def traced_layer(lock: ModelLock, files: Sequence[MappedFile]) -> Iterator[None]:
    """Around the experts of one layer, where a graph of :mod:`.operator` computes them outside of ``forward`` as :func:`guard` leaves it."""
    with lock.generation(), _unchanged(files):
        yield


def guard(
    model: nn.Module,
    observe: bool = False,
    debugger: Debugger | None = None,
    files: Sequence[MappedFile] = (),
    placement: Placement | None = None,
) -> ModelLock:
    """Let the model's ``generate`` and ``forward`` hold a lock of its own, also where PEFT wraps the model.

    Args:
        files: in which weights lie; also those that are added later.
        observe: note for the layers' :class:`RouterCounts` what each call computes.
        debugger: follows each call of ``forward``.
        placement: may exchange experts before ``generate``.

    A call that ``torch.compile`` or ``torch.export`` traces is left alone, unless somebody observes it: a graph holds no locks.
    """
    seen = observe or debugger is not None
    lock, reference = ModelLock(), weakref.ref(model)  # no cycle: a dropped model gives its memory back at once
    observers: dict[str, list[Observer]] = {"generate": [_own_team, _no_failure], "forward": []}
    if observe:
        observers["generate"].append(lambda kwargs: router_counts.generation(reference(), kwargs))
        observers["forward"].append(router_counts.call)
    observers["forward"].append(lambda _: _unchanged(files))
    if debugger is not None:
        observers["forward"].append(debugger.step)

    def through(name: str, stock: Callable[..., Any], observers: list[Observer]) -> MethodType:
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def call(_: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() and not seen:  # whoever looks at calls breaks the graph here
                return stock(reference(), *args, **kwargs)
            if placement is not None and name == "generate":
                placement.exchange_if_due(lock)
            with lock.generation(), contextlib.ExitStack() as notes:
                if observers:
                    by_name = {**signature.bind_partial(None, *args).arguments, **kwargs} if args else kwargs
                    for observer in observers:
                        notes.enter_context(observer(by_name))
                return stock(reference(), *args, **kwargs)

        return MethodType(call, weakref.proxy(model))  # LLaMA-Factory and transformers look into the method

    for name in observers:
        if stock := getattr(type(model), name, None):
            setattr(model, name, through(name, stock, observers[name]))
    vars(model)["load_adapter"] = _load_adapter
    return lock


def _load_adapter(*args: Any, **kwargs: Any) -> None:
    """In place of transformers' own, which it also calls by itself, where the name of a model is that of an adapter."""
    raise KTModelError(
        "transformers would apply all of an adapter but its routed experts' part. Load the base model, and use apply_adapter or "
        "switch_adapter of llamafactory_kt."
    )
