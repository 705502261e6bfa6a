"""A load in a thread of its own, which pages follow."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from threading import Event, Thread

from ...ground.errors import KTError, describe, traceback_wanted
from ...ground.paging import give_back_memory
from ...ground.progress import LoadProgress, watch_loads

logger = logging.getLogger("llamafactory_kt")

INTERVAL = 0.2
"""seconds between two looks at the load"""


class PageLoad:
    """Runs ``work`` at once; it goes on if the page that asked for it is closed.

    Args:
        debug: whether an error of ours goes to the log with its traceback; others always do.
    """

    def __init__(self, work: Callable[[], None], debug: bool = False):
        self.progress: LoadProgress | None = None
        self.error: str | None = None
        """one paragraph, once the work has failed"""
        self.started = time.monotonic()
        self._done = Event()
        self._debug = debug or traceback_wanted()
        Thread(target=copy_context().run, args=(self._run, work), name="load", daemon=True).start()

    @property
    def running(self) -> bool:
        return not self._done.is_set()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    def _run(self, work: Callable[[], None]) -> None:
        try:
            with watch_loads(self._note):
                work()
        except Exception as error:
            ours = isinstance(error, KTError)
            self.error = describe(error)
            logger.error("%s", self.error, exc_info=self._debug or not ours)
        finally:
            gc.collect()  # a failed load leaves cycles of half a model
            give_back_memory()
            self._done.set()

    def _note(self, progress: LoadProgress) -> None:
        self.progress = progress

    def follow(self, describe: Callable[[PageLoad], str]) -> Iterator[str]:
        """What ``describe`` says of the load, whenever that changes, until it has ended."""
        said = None
        while not self._done.wait(INTERVAL):
            if (text := describe(self)) != said:
                yield text
            said = text
