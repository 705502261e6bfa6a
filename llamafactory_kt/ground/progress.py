"""Progress of a load: a bar on stderr, and calls to a watcher."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from tqdm.auto import tqdm

Layer = TypeVar("Layer")


@dataclass(frozen=True)
class LoadProgress:
    """How many of the experts have been read."""

    layer: int
    """the layer that is being read, counted from 1"""
    layers: int
    read: int
    """bytes of the checkpoint's expert tensors that have been read"""
    total: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Mean since the load began; 0 before the first layer has been read.

        >>> LoadProgress(layer=3, layers=26, read=2000, total=26000, seconds=4).bytes_per_second
        500.0
        """
        return self.read / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class MeasureProgress:
    """What is being measured before a load."""

    plan: int
    """an engine with its threads, counted from 1"""
    plans: int


_watcher: ContextVar[Callable[[LoadProgress | MeasureProgress], None] | None] = ContextVar(
    "llamafactory_kt_load_watcher", default=None
)


@contextlib.contextmanager
def watch_loads(watcher: Callable[[LoadProgress | MeasureProgress], None]) -> Iterator[None]:
    """Call ``watcher`` before each plan that is measured, before each layer and at the end of all loads in this context (a thread, or an
    asyncio task)."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextlib.contextmanager
def measuring(plans: int) -> Iterator[Callable[[int], None]]:
    """While plans are measured: what is to be called with the number of each, counted from 1. A plan may come again."""
    watcher = _watcher.get()
    with tqdm(total=plans, unit="plan", desc="Measuring engines, once for this machine", bar_format=_BAR) as bar:

        def tell(plan: int) -> None:
            bar.set_postfix_str(f"{plan} of {plans}", refresh=True)
            bar.update(max(0, plan - 1 - bar.n))
            if watcher:
                watcher(MeasureProgress(plan, plans))

        yield tell
        bar.update(plans - bar.n)


_BAR = "{desc}: {postfix} {bar} {elapsed}"


def with_progress(layers: Sequence[Layer], nbytes: Sequence[int]) -> Iterator[Layer]:
    """Iterate over the layers with a progress bar; each is loaded before the next is asked for.

    Args:
        nbytes: bytes of the checkpoint that each layer reads.
    """
    watcher, started = _watcher.get(), time.perf_counter()
    total, read = sum(nbytes), 0

    def tell(number: int) -> None:
        if watcher:
            watcher(LoadProgress(number, len(layers), read, total, time.perf_counter() - started))

    # smoothing 0: the bar's speed is the mean, as the watcher's
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, smoothing=0, desc="Loading experts") as bar:
        for number, (layer, size) in enumerate(zip(layers, nbytes, strict=True), start=1):
            bar.set_postfix_str(f"layer {number} of {len(layers)}", refresh=True)
            tell(number)
            yield layer
            bar.update(size)
            read += size
        tell(len(layers))
