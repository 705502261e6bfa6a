"""The module that stands in for a model's routed experts."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn

from .contract import ExpertsModule
from .debugging import Debugger
from .engine import Engine
from .router_counts import RouterCounts
from .threads import enter


class KTExperts(nn.Module):
    """Routed experts computed by an engine on the CPU; called as transformers' own experts are.

    It has no parameters or buffers: ``model.to()``, ``.half()`` and ``requires_grad_()`` do not reach the weights.
    """

    def __init__(
        self, info: ExpertsModule, engine: Engine, router_stats: bool = False, debugger: Debugger | None = None
    ):
        super().__init__()
        self.info = info
        self.engine = engine
        self.debugger = debugger
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
        device = hidden_states.device
        index, weights = top_k_index.cpu(), top_k_weights.cpu()
        if self.router_counts is not None:
            self.router_counts.add(index, weights)
        if self.debugger is not None:
            debugged: torch.Tensor = self.debugger.forward(self.layer_idx, self.engine, hidden_states, index, weights)
            return debugged
        out = self.engine.forward(hidden_states.cpu(), index, weights)
        return out.to(device)

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
