"""Whose turn it is: answers of one adapter are generated while it is in place, and then those of another."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from ...apply import choose_adapter
from ...model.state import has_kt_experts, kt_state
from ..generation import Generation

logger = logging.getLogger("llamafactory_kt")

MOST_OVERTAKING = 4
"""answers of the adapter in place that may go before an older request for another one"""


@dataclass(eq=False)
class _Waiting:
    adapter: str | None
    generation: Generation
    overtaken: int = 0
    called: Future[None] = field(default_factory=Future)


class AdapterTurns:
    """Lets requests generate while the adapter that they want is in place, and exchanges it between them.

    Requests for one adapter are grouped: they may overtake an older one for another adapter, :data:`MOST_OVERTAKING` times in all. Then it
    is the older one's turn, as soon as the answers that run have ended. So each request is called after a bounded number of answers.

    Any thread may ask for a turn, in any event loop.

    Args:
        model: LLaMA-Factory's, with KT experts; without adapters to choose from, and for other models, nobody waits.
        switched: called after each exchange, with its seconds.
    """

    def __init__(self, model: Any, switched: Callable[[float], None]):
        self._model, self._switched = model, switched
        self._takes_turns = has_kt_experts(model) and bool(getattr(kt_state(model), "choices", None))
        self._most = max(1, int(os.environ.get("MAX_CONCURRENT", "1")))  # as LLaMA-Factory's semaphore
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        """the oldest first"""
        self._running: set[_Waiting] = set()
        self._switching = False
        self._switcher = ThreadPoolExecutor(1, "switching_adapters")

    def prepare(self) -> None:
        """Read all adapters, so that no request waits for that, and then apply what the configuration does.

        Raises:
            KTError: One cannot be put in place.
        """
        if not self._takes_turns:
            return
        for name in (*kt_state(self._model).choices, None):
            choose_adapter(self._model, name)
        logger.info(
            "Requests choose among the adapters %s, which are in memory.", ", ".join(kt_state(self._model).choices)
        )

    @asynccontextmanager
    async def turn(self, adapter: str | None, generation: Generation) -> AsyncIterator[None]:
        """Wait until an adapter is in place, and keep it there until the block ends.

        Args:
            adapter: its name; None for what the configuration applies.
            generation: one that is stopped does not wait for an exchange: nothing is generated any more.

        Raises:
            KTError: The adapter cannot be put in place; the one before it still is.
        """
        if not self._takes_turns:
            yield
            return
        waiting = _Waiting(adapter, generation)
        with self._lock:
            self._waiting.append(waiting)
        self._call()
        try:
            await asyncio.wrap_future(waiting.called)
        except BaseException:
            self._leave(waiting)
            raise
        try:
            yield
        finally:
            self._leave(waiting)

    def _leave(self, waiting: _Waiting) -> None:
        with self._lock:
            self._running.discard(waiting)
            if waiting in self._waiting:
                self._waiting.remove(waiting)
        self._call()

    def _call(self) -> None:
        """Call everybody whose turn it is, or begin to exchange the adapter."""
        with self._lock:
            if self._switching:
                return
            for waiting in [one for one in self._waiting if one.generation.stopped]:
                self._admit(waiting)
            while (following := self._next()) is not None:
                self._running.add(following)
                self._admit(following)
            if self._waiting and not self._running:
                self._switching = True
                self._switcher.submit(self._switch, self._waiting[0])

    def _admit(self, waiting: _Waiting) -> None:
        self._waiting.remove(waiting)
        with suppress(InvalidStateError):  # cancelled, and about to leave
            waiting.called.set_result(None)

    def _next(self) -> _Waiting | None:
        if not self._waiting or len(self._running) >= self._most:
            return None
        first = self._waiting[0]
        if self._fits(first):
            return first
        later = next(filter(self._fits, self._waiting), None) if first.overtaken < MOST_OVERTAKING else None
        first.overtaken += later is not None
        return later

    def _fits(self, waiting: _Waiting) -> bool:
        state = kt_state(self._model)
        return state.is_in_place(state.choice(waiting.adapter))

    def _switch(self, first: _Waiting) -> None:
        began, problem = time.perf_counter(), None
        try:
            choose_adapter(self._model, first.adapter)
        except BaseException as error:  # whatever it is, it is for the request
            problem = error
        seconds = time.perf_counter() - began
        with self._lock:
            self._switching = False
            if problem is not None and first in self._waiting:
                self._waiting.remove(first)
                with suppress(InvalidStateError):
                    first.called.set_exception(problem)
        if problem is None:
            logger.debug("Answers now come from %s.", first.adapter or "what the configuration applies")
            self._switched(seconds)
        self._call()
