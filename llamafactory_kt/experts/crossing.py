"""The way of a layer's tokens from the GPU to the experts on the CPU and back, and what the GPU does meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

SHARED_EXPERTS = ("shared_experts", "shared_expert", "shared_mlp")
"""what transformers' MoE blocks call them"""

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Event(Protocol):
    """What is used of torch.cuda.Event."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Crossing:
    """Pinned buffers that all layers of a model on one GPU use in turn.

    Tokens, choices and weights cross in one go; the CPU waits once a layer, for just these copies, so that kernels
    which are queued after them run while the experts are computed. The sum crosses back without a wait.

    Args:
        event: makes an event of the GPU's current stream.
        pinned: whether buffers are page-locked, which copies that nobody waits for need.
    """

    def __init__(self, event: Callable[[], Event] = torch.cuda.Event, pinned: bool = True):
        self._lock = threading.Lock()
        self._arrived, self._left, self._pinned = event(), event(), pinned
        self._buffers: dict[str, torch.Tensor] = {}

    def run(
        self,
        compute: Compute,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """``compute(hidden, index, weights)`` on the CPU, with arguments and result on the GPU.

        Args:
            meanwhile: queues work for the GPU that does not need the result.

        Raises:
            RuntimeError: A CUDA graph is being captured, which cannot hold work of the CPU.
        """
        # events are of the current GPU's stream, copies of the tensor's
        with torch.cuda.device(hidden.device) if hidden.is_cuda else contextlib.nullcontext(), self._lock:
            if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "KT experts are computed on the CPU and cannot be captured in a CUDA graph; generate without "
                    "torch.compile and without a static cache."
                )
            self._left.synchronize()  # another stream may still copy the last result out of its buffer
            x = self._buffer("hidden", hidden).copy_(hidden, non_blocking=True)
            chosen = self._buffer("index", index).copy_(index, non_blocking=True)
            scores = self._buffer("weights", weights).copy_(weights, non_blocking=True)
            self._arrived.record()
            if meanwhile is not None:
                meanwhile()
            self._arrived.synchronize()
            result = compute(x, chosen.clone(), scores.clone())  # router statistics keep these
            back = self._buffer("result", result).copy_(result)
            out = torch.empty_like(hidden, memory_format=torch.contiguous_format).copy_(back, non_blocking=True)
            self._left.record()
        return out

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A buffer of ``like``'s shape and dtype. It grows, and is never given away while a copy is under way."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < like.numel() or buffer.dtype != like.dtype:
            buffer = self._buffers[name] = torch.empty(like.numel(), dtype=like.dtype, pin_memory=self._pinned)
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
