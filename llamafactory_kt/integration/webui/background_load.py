"""A load that runs in its own thread, and what pages show of it."""

from __future__ import annotations

import gc
import html
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from threading import Event, Thread

from ...ground.errors import KTError, describe, traceback_wanted
from ...ground.machine import gib
from ...ground.paging import give_back_memory
from ...ground.progress import LoadProgress, MeasureProgress, watch_loads
from .texts import say

logger = logging.getLogger("llamafactory_kt")

INTERVAL = 0.2
"""seconds between two updates of a page"""


class PageLoad:
    """A model that is being loaded, or an adapter that is being switched. Continues if the page that asked for it is closed.

    Args:
        work: starts at once.
        switching: whether the work switches the adapter of the loaded model.
        debug: whether to log our own errors with a traceback; other errors always have one.
    """

    def __init__(self, work: Callable[[], None], switching: bool, debug: bool):
        self._switching = switching
        self._debug = debug or traceback_wanted()
        self._progress: LoadProgress | MeasureProgress | None = None
        self._error: str | None = None
        self._started = time.monotonic()
        self._done = Event()
        Thread(target=copy_context().run, args=(self._run, work), name="load", daemon=True).start()

    @property
    def running(self) -> bool:
        return not self._done.is_set()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            with watch_loads(self._note):
                work()
        except Exception as error:
            self._error = describe(error)
            logger.error("%s", self._error, exc_info=self._debug or not isinstance(error, KTError))
        finally:
            gc.collect()  # a failed load leaves reference cycles that hold half a model
            give_back_memory()
            self._done.set()

    def _note(self, progress: LoadProgress | MeasureProgress) -> None:
        self._progress = progress

    def report(self, language: str) -> Iterator[str]:
        """The status line of a page whenever it changes, the result last."""
        from llamafactory.webui.locales import ALERTS

        begun, done, failed = ALERTS["info_loading"][language], ALERTS["info_loaded"][language], "failed"
        if self._switching:
            begun, done, failed = say("switching", language), say("switched", language), "not_switched"
        yield begun
        shown = None
        while not self._done.wait(INTERVAL):
            if (status := self._status(language, begun)) != shown:
                yield status
            shown = status
        yield warn(say(failed, language, error=self._error)) if self._error else done

    def _status(self, language: str, begun: str) -> str:
        at, seconds = self._progress, time.monotonic() - self._started
        if isinstance(at, MeasureProgress):
            return say("measuring", language, plan=at.plan, plans=at.plans, seconds=seconds)
        if self._switching or at is None or at.read == at.total:
            return say("waiting", language, before=begun, seconds=seconds)
        return say(
            "experts", language, layer=at.layer, layers=at.layers, read=gib(at.read), total=gib(at.total),
            speed=gib(at.bytes_per_second), seconds=seconds,
        )  # fmt: skip


def warn(text: str) -> str:
    """Show a warning as LLaMA-Factory's pages do; returns it for the status line."""
    import gradio

    gradio.Warning(html.escape(text))
    return text
