"""The module that stands in for a model's routed experts."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NoReturn

import torch
from torch import nn

from ..checkpoint.discovery import ExpertsModule
from ..engines.base import Engine
from ..ground.process import register_thread
from ..native.recording import active
from .debug import Debugger
from .on_gpu.shared_overlap import SharedExpertsOverlap
from .on_gpu.split_experts import SplitExperts
from .on_gpu.transfer import CudaStream, HostTransfer
from .operator import experts, register
from .router_counts import RouterCounts

_thread = threading.local()


@contextlib.contextmanager
def before_layers(look: Callable[[], None]) -> Iterator[None]:
    """Call something before the experts of each layer that this thread computes. What it raises ends the call of the model."""
    _thread.look = look
    try:
        yield
    finally:
        _thread.look = None


class KTExperts(nn.Module):
    """Routed experts computed by an engine on the CPU; called as transformers' own experts are.

    It has no parameters or buffers: ``model.to()``, ``.half()`` and ``requires_grad_()`` do not reach the weights.

    Args:
        transfers: of each stream of a GPU, shared by the layers of a model.
        overlap: the layer's shared experts, where they are computed meanwhile.
    """

    def __init__(
        self,
        info: ExpertsModule,
        engine: Engine,
        router_stats: bool = False,
        debugger: Debugger | None = None,
        transfers: dict[torch.cuda.Stream, HostTransfer] | None = None,
        overlap: SharedExpertsOverlap | None = None,
    ):
        super().__init__()
        self.info = info
        self.engine = engine
        self.debugger = debugger
        self.transfers = transfers if transfers is not None else {}
        self.overlap = overlap
        self.split: SplitExperts | None = None
        """where some of the experts are on a GPU"""
        self.router_counts = RouterCounts(info.shape.num_experts) if router_stats else None
        self.layer_idx = info.layer
        self.num_experts = info.shape.num_experts
        self.hidden_dim = info.shape.hidden_size
        self.intermediate_dim = info.shape.intermediate_size
        self.around_traced: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
        """what a graph needs around this layer, which nobody else holds (:func:`.guard.traced_layer`)"""
        self._number = register(self)

    @property
    def whole(self) -> Engine | SplitExperts:
        """What computes all experts and takes their LoRA."""
        return self.split or self.engine

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H], on the input's device and dtype."""
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise RuntimeError("KT experts are for inference; run the model under torch.no_grad().")
        if torch.compiler.is_compiling():
            traced: torch.Tensor = experts(hidden_states, top_k_index, top_k_weights, self._number)
            return traced
        return self.compute(hidden_states, top_k_index, top_k_weights)

    def compute_traced(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """:meth:`forward`, when a traced graph runs (:mod:`.operator`)."""
        with self.around_traced():
            return self.compute(hidden, index, weights)

    def compute(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What :meth:`forward` computes, where nobody traces it."""
        register_thread()
        if (look := getattr(_thread, "look", None)) is not None:
            look()
        given = hidden, index, weights
        seen = self.router_counts.add if self.router_counts is not None else None
        on_cpu = hidden.device.type == "cpu"
        if seen is not None and (on_cpu or self.debugger is not None):
            seen(index.cpu(), weights.cpu())
            if active.recorder is not None:
                active.recorder.note("seen", seen, (index, weights), None)
        if self.debugger is not None:
            debugged: torch.Tensor = self.debugger.forward(self.layer_idx, self.whole, *given)
            return debugged
        if on_cpu:
            return self.whole.forward(*given)
        stream = torch.cuda.current_stream(hidden.device)
        if (transfer := self.transfers.get(stream)) is None:
            transfer = self.transfers.setdefault(stream, HostTransfer(CudaStream(stream)))
        meanwhile = functools.partial(self.overlap.queue, hidden) if self.overlap is not None else None
        return transfer.forward(self.engine, given, meanwhile, seen, self.split)

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        raise TypeError("KT experts cannot be copied: the kernel holds pointers to their memory. Load the model again.")

    def __reduce__(self) -> NoReturn:
        raise TypeError("KT experts cannot be pickled or saved; save the adapter or the original checkpoint instead.")

    def extra_repr(self) -> str:
        shape = self.info.shape
        return (
            f"layer={self.layer_idx}, engine={self.engine.name}, num_experts={shape.num_experts}, "
            f"hidden_size={shape.hidden_size}, moe_intermediate_size={shape.intermediate_size}"
        )


class PresortedExperts(nn.Module):
    """Hands KT experts the rows that are not zero, of all tokens for each expert, multiplied with the routers' weights (Llama-4). Experts
    without biases make zeros of zeros."""

    def __init__(self, experts: KTExperts):
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [E * T, H], expert by expert -> [E * T, H]."""
        rows = hidden_states.any(-1).nonzero()[:, 0]
        tokens = len(hidden_states) // self.experts.num_experts
        weights = torch.ones(len(rows), 1, dtype=hidden_states.dtype, device=hidden_states.device)
        out = torch.zeros_like(hidden_states)
        out[rows] = self.experts(hidden_states[rows], (rows // tokens)[:, None], weights)
        return out
