"""A load that runs in its own thread, and what pages show of it."""

from __future__ import annotations

import gc
import html
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from threading import Event, Thread
from typing import Any

from ...ground.errors import KTError, describe, traceback_wanted
from ...ground.machine import gib
from ...ground.paging import give_back_memory
from ...ground.process import register_thread
from ...ground.progress import LoadProgress, MeasureProgress, watch_loads
from .texts import in_page_words, say

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
        self._stopped = False
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
            register_thread()
            with watch_loads(self._note):
                work()
            self._stopped = False
        except _Stopped:
            pass
        except Exception as error:
            self._stopped, self._error = False, describe(error, lines=True)
            logger.error("%s", self._error, exc_info=self._debug or not isinstance(error, KTError))
        finally:
            gc.collect()  # a failed load leaves reference cycles that hold half a model
            give_back_memory()
            self._done.set()

    def _note(self, progress: LoadProgress | MeasureProgress) -> None:
        self._progress = progress
        register_thread()
        if self._stopped:
            raise _Stopped

    def stop(self) -> None:
        """End it before the next layer, or the next engine that is measured."""
        self._stopped = True

    def wait(self) -> None:
        """Return when it has ended."""
        self._done.wait()

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
        if self._stopped:
            yield say("load_stopped", language)
        elif self._error:
            yield warn(say(failed, language, error=in_page_words(self._error, language)))
        else:
            yield done

    def _status(self, language: str, begun: str) -> str:
        from llamafactory.webui.locales import LOCALES

        at, seconds = self._progress, time.monotonic() - self._started
        if self._stopped:
            return say("stopping_load", language)
        stop = say("can_stop", language, button=LOCALES["unload_btn"][language]["value"])
        if isinstance(at, MeasureProgress):
            return say("measuring", language, plan=at.plan, plans=at.plans, seconds=seconds) + stop
        if self._switching or at is None or at.read == at.total:
            return say("waiting", language, before=begun, seconds=seconds)
        return say(
            "experts", language, layer=at.layer, layers=at.layers, read=gib(at.read), total=gib(at.total),
            speed=gib(at.bytes_per_second), seconds=seconds,
        ) + stop  # fmt: skip


def running_load(chatter: Any) -> PageLoad | None:
    """The load that another page, or this one before a reload, has started."""
    load: PageLoad | None = getattr(chatter, "_kt_load", None)
    return load if load is not None and load.running else None


def warn(text: str) -> str:
    """Show a warning as LLaMA-Factory's pages do; returns it for the status line."""
    import gradio

    gradio.Warning(html.escape(text).replace("\n", "<br>"))
    return text


class _Stopped(Exception):
    """Ends a load that the user has stopped."""
