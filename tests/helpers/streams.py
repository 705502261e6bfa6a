"""A stand-in for a GPU's stream that lags behind as far as a stream may, so that a missing wait gives wrong results.

Queued work is done in order, and only when somebody waits for it. Code that reads too early finds poison; code that
writes too early changes what is still to be copied; and a buffer that is freed too early is found out.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch


class LateStream:
    """A ``DeviceStream`` whose GPU is the CPU.

    Args:
        behind: whether it lags behind; otherwise all work is done at once.
    """

    cuda_stream = 7
    device = torch.device("cpu")
    capturing = False

    def __init__(self, behind: bool = True):
        self.behind = behind
        self.log: list[str] = []
        """what was done on it, apart from copies"""
        self.allocated: list[int] = []
        """sizes of the page-locked buffers, as they were made"""
        self._queue: deque[Callable[[], None]] = deque()
        self._passed = self._mark = 0
        self._tasks: list[Callable[[], None]] = []
        self._buffers: dict[int, tuple[weakref.ref[torch.Tensor], torch.UntypedStorage]] = {}
        self._lock = threading.RLock()

    def current(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer full of NaN, or of expert numbers that no model has."""
        buffer = torch.full((count,), torch.nan if dtype.is_floating_point else 10**6, dtype=dtype)
        self.allocated.append(count)
        storage = buffer.untyped_storage()  # kept, so that no other tensor gets the memory of one that was given up
        self._buffers[storage.data_ptr()] = weakref.ref(buffer), storage
        return buffer

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        to, of = self._place(target), self._place(source)
        self._add(lambda: to().copy_(of()))
        return target

    def _place(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """How to find a tensor when its turn comes: a buffer is only there as long as its owner holds it."""
        buffer, storage = self._buffers.get(tensor.untyped_storage().data_ptr(), (None, None))
        if buffer is None:
            return lambda: tensor
        view = tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()

        def find() -> torch.Tensor:
            assert buffer() is not None, "a buffer was given up before the stream had passed its last use"
            dtype, offset, shape, stride = view
            return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)

        return find

    def launch(self, task: Callable[[], None]) -> None:
        """Let the CPU start a task when the stream gets there. The task is done no earlier than when the stream waits
        for it."""
        self.log.append("launch")
        self._add(lambda: self._tasks.append(task))

    def join(self, after: Callable[[], None] = lambda: None) -> None:
        """Let the stream wait for the CPU's tasks, and call ``after``."""
        self.log.append("join")

        def work() -> None:
            while self._tasks:
                self._tasks.pop(0)()
            after()

        self._add(work)

    def record(self) -> None:
        self.log.append("record")
        with self._lock:
            self._mark = self._passed + len(self._queue)

    def synchronize(self) -> None:
        self.log.append("wait")
        self._advance(self._mark)

    def finish(self) -> None:
        """Wait for all work, as ``torch.cuda.synchronize`` does."""
        with self._lock:
            self._advance(self._passed + len(self._queue))
        assert not self._tasks, "the stream did not wait for the CPU"

    def _add(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._queue.append(work)
            if not self.behind:
                self._advance(self._passed + len(self._queue))

    def _advance(self, mark: int) -> None:
        with self._lock, torch.inference_mode():
            while self._passed < mark:
                self._passed += 1
                self._queue.popleft()()


class LateWorkers:
    """kt-kernel's task queue; its two calls for CUDA streams take a :class:`LateStream`."""

    def __init__(self, stock: Any, stream: LateStream):
        self._stock, self._stream = stock, stream
        self.submit, self.sync = stock.submit, stock.sync

    def submit_with_cuda_stream(self, stream: int, task: Any) -> None:
        assert stream == self._stream.cuda_stream
        self._stream.launch(lambda: self._stock.submit(task))

    def sync_with_cuda_stream(self, stream: int) -> None:
        assert stream == self._stream.cuda_stream
        self._stream.join(self._stock.sync)
