"""The module that stands in for a model's routed experts."""

from __future__ import annotations

import functools
from typing import NoReturn

import torch
from torch import nn

from ..checkpoint.discovery import ExpertsModule
from ..engines.base import Engine
from ..engines.ktkernel.engine import KTEngine
from ..ground.process import enter
from .debug import Debugger
from .gpu_transfer import Crossing, EarlyShared
from .router_counts import RouterCounts


class KTExperts(nn.Module):
    """Routed experts computed by an engine on the CPU; called as transformers' own experts are.

    It has no parameters or buffers: ``model.to()``, ``.half()`` and ``requires_grad_()`` do not reach the weights.
    """

    def __init__(
        self,
        info: ExpertsModule,
        engine: Engine,
        router_stats: bool = False,
        debugger: Debugger | None = None,
        crossings: dict[torch.cuda.Stream, Crossing] | None = None,
        early: EarlyShared | None = None,
    ):
        super().__init__()
        self.info = info
        self.engine = engine
        self.debugger = debugger
        self.crossings = crossings if crossings is not None else {}
        """of each stream of a GPU, shared by the layers of a model"""
        self.early = early
        self.router_counts = RouterCounts(info.shape.num_experts) if router_stats else None
        self.layer_idx = info.layer
        self.num_experts = info.shape.num_experts
        self.hidden_dim = info.shape.hidden_size
        self.intermediate_dim = info.shape.intermediate_size

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H], on the input's device and dtype."""
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise RuntimeError("KT experts are for inference; run the model under torch.no_grad().")
        enter()
        if self.debugger is not None:
            if self.router_counts is not None:
                self.router_counts.add(top_k_index.cpu(), top_k_weights.cpu())
            given = (hidden_states, top_k_index, top_k_weights)
            debugged: torch.Tensor = self.debugger.forward(self.layer_idx, self.engine, *given)
            return debugged
        if hidden_states.device.type == "cpu":
            return self._compute(hidden_states, top_k_index, top_k_weights)
        stream = torch.cuda.current_stream(hidden_states.device)
        if (crossing := self.crossings.get(stream)) is None:
            crossing = self.crossings.setdefault(stream, Crossing(stream))
        meanwhile = functools.partial(self.early.queue, hidden_states) if self.early is not None else None
        given = (hidden_states, top_k_index, top_k_weights)
        engine = self.engine
        if isinstance(engine, KTEngine) and engine.queues and self.router_counts is None:  # they need the values here
            return crossing.queue(engine, given, meanwhile)
        return crossing.wait(self._compute, given, meanwhile)

    def _compute(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """On the CPU."""
        if self.router_counts is not None:
            self.router_counts.add(index, weights)
        return self.engine.forward(hidden, index, weights)

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
