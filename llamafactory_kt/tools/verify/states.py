"""What the routed experts of a model are really given: recorded while it reads a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...model.state import kt_state


@dataclass(frozen=True)
class Inputs:
    """The arguments of one experts module for a prompt of T tokens, on the CPU."""

    hidden: torch.Tensor
    """[T, H], in the model's dtype"""
    index: torch.Tensor
    """[T, K] int64"""
    weights: torch.Tensor
    """[T, K], float"""


def record_inputs(model: Any, token_ids: Sequence[int]) -> dict[int, Inputs]:
    """Run the model over a prompt once and keep what each layer's experts were given.

    Returns:
        layer -> its inputs.
    """
    inputs: dict[int, Inputs] = {}

    def keep(module: Any, arguments: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = {**dict(zip(names, arguments, strict=False)), **named}
        inputs[module.layer_idx] = Inputs(*(given[name].detach().cpu().clone() for name in names))

    handles = [wrapper.register_forward_pre_hook(keep, with_kwargs=True) for wrapper in kt_state(model).wrappers]
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(token_ids)], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs
