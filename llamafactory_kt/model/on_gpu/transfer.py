"""The way of a layer's tokens from the GPU to the experts on the CPU and back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch.nn import functional as F

from ...engines.base import Engine, Stream
from ...native.on_host import relaxed_capture
from .split_experts import SplitExperts, plain

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""one layer's tokens on the GPU: hidden [T, H], index [T, K], weights [T, K], as :meth:`Engine.forward` takes them"""
Meanwhile = Callable[[], None]
"""queues work for the GPU that does not need the experts' result"""
Seen = Callable[[torch.Tensor, torch.Tensor], None]
"""is given index and weights on the CPU, to keep"""


class DeviceStream(Stream, Protocol):
    """A stream of a GPU, and what a transfer does on it."""

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""

    def current(self) -> AbstractContextManager[object]:
        """Make its GPU the current one: events and tasks are the current GPU's, copies the tensor's."""

    def pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A page-locked buffer, which copies that nobody waits for need; also while a graph is being captured."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Queue a copy; nothing is waited for. Returns the target."""

    def record(self) -> None:
        """Record an event after the work queued so far."""

    def synchronize(self) -> None:
        """Wait for that event."""


class CudaStream:
    """A :class:`DeviceStream` of CUDA."""

    def __init__(self, stream: torch.cuda.Stream):
        self.cuda_stream: int = stream.cuda_stream
        self.device: torch.device = stream.device
        self._event = torch.cuda.Event()

    @property
    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def pinned(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        with relaxed_capture() if self.capturing else contextlib.nullcontext():
            return torch.empty(count, dtype=dtype, device="cpu", pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return target.copy_(source, non_blocking=True)

    def record(self) -> None:
        self._event.record()

    def synchronize(self) -> None:
        self._event.synchronize()


class HostTransfer:
    """Pinned buffers that all layers of a model use in turn on one stream of a GPU.

    Tokens, choices and weights cross in one go, and the sum crosses back; the stream keeps the layers' uses of the buffers
    apart. Either the stream waits for the experts, and Python queues the following layers meanwhile, or this thread waits once a
    layer, for what crosses to the CPU.

    CUDA graphs that are captured on the stream have buffers of their own, which stay as long as this object. Graphs of one model share
    them: replay one after the other.
    """

    def __init__(self, stream: DeviceStream):
        self._stream = stream
        self._lock = threading.Lock()
        self._buffers: dict[str, torch.Tensor] = {}
        self._captured: dict[str, torch.Tensor] = {}
        self._kept: list[torch.Tensor] = []
        """all that graphs know"""

    def forward(
        self,
        engine: Engine,
        given: Given,
        meanwhile: Meanwhile | None = None,
        seen: Seen | None = None,
        split: SplitExperts | None = None,
    ) -> torch.Tensor:
        """The engine's sum [T, H], with arguments and result on the GPU.

        Args:
            seen: who needs the values on the CPU; then this thread waits for them.
            split: whose experts on the GPU are computed at the same time, and added. This thread waits for what was chosen, and not for
                an engine that the stream waits for.

        Raises:
            RuntimeError: A CUDA graph is being captured, which cannot hold this.
        """
        with self._stream.current(), self._lock:
            if self._stream.capturing and (seen is not None or split is not None or not engine.captures):
                what = (
                    "kt_gpu_experts"
                    if split is not None
                    else "kt_router_stats"
                    if seen is not None
                    else f"kt_backend: {engine.name}"
                )
                raise RuntimeError(
                    f"KT experts cannot be captured in a CUDA graph with {what}: a thread must wait for each layer. Leave that out, or "
                    "generate without CUDA graphs."
                )
            if split is not None:
                given = given[0], split.mark(given[1]), given[2]
            if engine.streams and seen is None:
                out, here = self._queue(engine, given, meanwhile, split)
            else:
                out, here = self._wait(engine, given, meanwhile, seen, split)
            return out if here is None else (out + here).to(out.dtype)

    def _queue(
        self, engine: Engine, given: Given, meanwhile: Meanwhile | None, split: SplitExperts | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stream waits for the experts on the CPU."""
        hidden, index, weights = given
        x = hidden.to(engine.stream_dtype(hidden.dtype))
        if padding := engine.stream_hidden_size - hidden.shape[1]:
            x = F.pad(x, (0, padding))
        x = x.contiguous()
        crossed = self._to_host((x, index.to(torch.int64).contiguous(), weights.to(torch.float32).contiguous()))
        result, here = self._buffer("result", x), None
        if split is not None:
            self._stream.record()
        with engine.on_stream(self._stream, *crossed, result):
            if meanwhile is not None:
                meanwhile()
            if split is not None:
                self._stream.synchronize()
                here = split.compute(hidden, crossed[1], weights)
        out = self._stream.copy(torch.empty_like(x), result)
        return out[:, : hidden.shape[1]].to(hidden.dtype), here

    def _wait(
        self, engine: Engine, given: Given, meanwhile: Meanwhile | None, seen: Seen | None, split: SplitExperts | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This thread waits for the tokens, and computes the experts."""
        x, index, weights = self._to_host(given)
        self._stream.record()
        if meanwhile is not None:
            meanwhile()
        self._stream.synchronize()
        if seen is not None:
            seen(plain(index), weights.clone())
        here = split.compute(given[0], index, given[2]) if split is not None else None
        computed = engine.forward(x, index, weights)
        result = self._buffer("result", computed).copy_(computed)
        out = self._stream.copy(torch.empty_like(given[0], memory_format=torch.contiguous_format), result)
        return out, here

    def _to_host(self, given: Given) -> Given:
        hidden, index, weights = (
            self._stream.copy(self._buffer(name, tensor), tensor)
            for name, tensor in zip(("hidden", "index", "weights"), given, strict=True)
        )
        return hidden, index, weights

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A buffer of ``like``'s shape and dtype. It grows, and is never given away while the stream may use it."""
        buffers = self._captured if self._stream.capturing else self._buffers
        buffer = buffers.get(name)
        if buffer is None or buffer.numel() < like.numel() or buffer.dtype != like.dtype:
            if not self._stream.capturing:
                self._stream.record()
                self._stream.synchronize()
            with torch.inference_mode(False):  # a tensor made in that mode can only be written in it
                buffer = buffers[name] = self._stream.pinned(like.numel(), like.dtype)
            if self._stream.capturing:
                self._kept.append(buffer)
        return buffer[: like.numel()].view(like.shape)
