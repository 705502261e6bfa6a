"""The lock of a model: generations and the exchange of adapters keep out of each other's way."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..ground.process import require_own_process
from ..ground.uninterrupted import uninterrupted
from ..native.openmp import release_team

Result = TypeVar("Result")


class ModelLock:
    """A readers-writer lock: many generations at once, or one exchange alone. An exchange that waits goes before generations that come
    later. The standard library has no such lock.

    Each thread that generates holds a lock of its own, and an exchange holds those of all threads. They are Python's own locks, which
    ``with`` takes and gives back in one step each, so that no Ctrl-C leaves one behind. A count would be wrong if one came between the
    lines that change it.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        """held by an exchange; a generation takes it on its way"""
        self._every: dict[int, weakref.ref[Any]] = {}
        self._own = threading.local()

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """Keep the model as it is. Reentrant: ``generate`` calls ``forward``.

        Raises:
            KTKernelError: The process was forked from the model's.
        """
        require_own_process()
        own = self._of_this_thread()
        if not own._is_owned():
            with self._turn:
                pass
        with own:
            yield

    def wait_until_idle(self) -> None:
        """Return when the generations that run now have ended."""
        for lock in self._of_all_threads():
            with lock:
                pass

    def alone(self, work: Callable[[], Result]) -> Result:
        """Do something with the model alone (:meth:`exchange`) that Ctrl-C does not leave half done (:func:`uninterrupted`).

        Raises:
            RuntimeError: As :meth:`exchange`.
            KTKernelError: As :meth:`exchange`.
        """
        self._check_outside()
        release_team()  # another thread computes now

        def locked() -> Result:
            with self.exchange():
                return work()

        return uninterrupted(locked)

    def alone_if_idle(self, work: Callable[[], object]) -> bool:
        """The same, if nobody generates or exchanges; otherwise nothing is done, or waited for. Returns whether it was done.

        Raises:
            KTKernelError: As :meth:`exchange`.
        """
        require_own_process()
        if self._of_this_thread()._is_owned():
            return False
        release_team()  # another thread computes now

        def locked() -> bool:
            with contextlib.ExitStack() as held:
                if not _took(self._turn, held) or not all(_took(lock, held) for lock in self._of_all_threads()):
                    return False
                try:
                    work()
                finally:
                    release_team()
            return True

        return uninterrupted(locked)

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Have the model alone; waits for generations that run. The calling thread may use the model itself.

        Raises:
            RuntimeError: The calling thread is generating, and would wait for itself.
            KTKernelError: As in :meth:`generation`.
        """
        self._check_outside()
        own = self._of_this_thread()
        with self._turn, own, contextlib.ExitStack() as others:
            for lock in self._of_all_threads():
                others.enter_context(lock)
            try:
                yield
            finally:
                release_team()

    def _check_outside(self) -> None:
        require_own_process()
        if self._of_this_thread()._is_owned():
            raise RuntimeError("The model cannot be changed from within a generation.")

    def _of_this_thread(self) -> Any:
        """An RLock, which tells in CPython whether its thread holds it (``Condition`` asks it, too); it goes with its thread."""
        lock = getattr(self._own, "lock", None)
        if lock is None:
            lock = threading.RLock()
            self._every[threading.get_ident()] = weakref.ref(lock)  # in the place of one whose thread has ended
            self._own.lock = lock
        return lock

    def _of_all_threads(self) -> list[Any]:
        return [lock for reference in list(self._every.values()) if (lock := reference()) is not None]


def _took(lock: Any, held: contextlib.ExitStack) -> bool:
    """Take a lock that is free, until the block ends."""
    taken: bool = lock.acquire(blocking=False)
    if taken:
        held.callback(lock.release)
    return taken
