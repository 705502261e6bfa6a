"""The lock of a model: generations and the exchange of adapters keep out of each other's way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ..ground.process import require_own_process
from ..matmul.openmp import release_team


class ModelLock:
    """A readers-writer lock: many generations at once, or one exchange alone. An exchange that waits goes before generations that come
    later. The standard library has no such lock."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting = 0
        self._exchanging = False
        self._inside = threading.local()

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """Keep the model as it is. Reentrant: ``generate`` calls ``forward``.

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
