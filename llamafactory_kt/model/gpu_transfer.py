"""The way of a layer's tokens from the GPU to the experts on the CPU and back, and what the GPU does meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from ..engines.ktkernel.engine import KTEngine
from ..engines.ktkernel.stream import Stream

SHARED_EXPERTS = ("shared_experts", "shared_expert", "shared_mlp")
"""what transformers' MoE blocks call them"""

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""of one layer's tokens: hidden [T, H], index [T, K], weights [T, K], as :meth:`Engine.forward` takes them"""
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Meanwhile = Callable[[], None]
"""Queues work for the GPU that does not need the experts' result."""


class Event(Protocol):
    """What is used of torch.cuda.Event."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Crossing:
    """Pinned buffers that all layers of a model use in turn on one stream of a GPU.

    Tokens, choices and weights cross in one go, and the sum crosses back; the stream keeps the layers' uses of the buffers
    apart. Either the stream waits for the experts (:meth:`queue`), and Python queues the following layers meanwhile, or a
    thread waits once a layer, for what crosses to the CPU (:meth:`wait`).

    Args:
        event: makes an event of the GPU's current stream.
        pinned: whether buffers are page-locked, which copies that nobody waits for need.
    """

    def __init__(self, stream: Stream, event: Callable[[], Event] = torch.cuda.Event, pinned: bool = True):
        self._stream, self._pinned = stream, pinned
        self._lock, self._arrived = threading.Lock(), event()
        self._buffers: dict[str, torch.Tensor] = {}

    def queue(self, engine: KTEngine, given: Given, meanwhile: Meanwhile | None = None) -> torch.Tensor:
        """The engine's sum [T, H], with arguments and result on the GPU. Nothing is waited for.

        Raises:
            RuntimeError: A CUDA graph is being captured.
        """
        hidden = given[0]
        with self._using(hidden):
            read = engine.as_read(*given)
            x, chosen, scores = self._cross(read)
            back = self._buffer("result", read[0])
            try:
                engine.submit(self._stream, x, chosen, scores, back)
                if meanwhile is not None:
                    meanwhile()
            finally:
                engine.join(self._stream)  # else the next layer would write what this one still reads
            out = torch.empty_like(read[0]).copy_(back, non_blocking=True)
        return out[:, : hidden.shape[1]].to(hidden.dtype)

    def wait(self, compute: Compute, given: Given, meanwhile: Meanwhile | None = None) -> torch.Tensor:
        """``compute(*given)`` [T, H] on the CPU, with arguments and result on the GPU.

        Raises:
            RuntimeError: A CUDA graph is being captured, which cannot hold work of the CPU.
        """
        hidden = given[0]
        with self._using(hidden):
            x, chosen, scores = self._cross(given)
            self._arrived.record()
            if meanwhile is not None:
                meanwhile()
            self._arrived.synchronize()
            result = compute(x, chosen.clone(), scores.clone())  # router statistics keep these
            back = self._buffer("result", result).copy_(result)
            return torch.empty_like(hidden, memory_format=torch.contiguous_format).copy_(back, non_blocking=True)

    @contextlib.contextmanager
    def _using(self, hidden: torch.Tensor) -> Iterator[None]:
        # events and kt-kernel's tasks are of the current GPU, copies of the tensor's
        with torch.cuda.device(hidden.device) if hidden.is_cuda else contextlib.nullcontext(), self._lock:
            if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "KT experts are computed on the CPU and cannot be captured in a CUDA graph; generate without torch.compile."
                )
            yield

    def _cross(self, given: Given) -> list[torch.Tensor]:
        names = ("hidden", "index", "weights")
        return [
            self._buffer(name, tensor).copy_(tensor, non_blocking=True)
            for name, tensor in zip(names, given, strict=True)
        ]

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A buffer of ``like``'s shape and dtype. It grows, and is never given away while the stream may use it."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < like.numel() or buffer.dtype != like.dtype:
            self._arrived.record()
            self._arrived.synchronize()
            with torch.inference_mode(False):  # what is made in that mode can only be written in it
                buffer = torch.empty(like.numel(), dtype=like.dtype, device="cpu", pin_memory=self._pinned)
            self._buffers[name] = buffer
        return buffer[: like.numel()].view(like.shape)


class EarlyShared:
    """Lets a layer's shared experts, which its forward calls after the routed ones, be queued before those are waited for.

    Models whose forward calls them first are left as they are.

    Args:
        module: the shared experts, given the same tokens as the routed ones.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._stock = module.forward
        self._local = threading.local()
        module.forward = self._forward

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        ready = getattr(self._local, "ready", None)
        self._local.ready = None
        if ready is not None and not (args or kwargs) and _same(ready[0], x):
            return ready[1].view(*x.shape[:-1], -1)
        self._local.seen = x
        return self._stock(x, *args, **kwargs)

    def queue(self, hidden: torch.Tensor) -> None:
        """Compute them for ``hidden`` [T, H] now, unless that was done just before."""
        seen, self._local.seen = getattr(self._local, "seen", None), None
        if seen is None or not _same(seen, hidden):
            value = self._module(hidden)
            self._local.ready, self._local.seen = (hidden, value), None


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same memory, seen in whatever shape. Both are alive, so it holds the same values."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.shape[-1] == other.shape[-1]
