"""One layer after the other: what its engine gives, and what it should."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...engines.bounds import Bounds
from ...model.state import KTState, kt_state
from .compare import Comparison, compare
from .reference import Reference
from .states import Inputs


@dataclass(frozen=True)
class LayerResult:
    """What was found in one layer."""

    layer: int
    engine: str
    prompt: Comparison
    """on the prompt's tokens, routed as the model's router did"""
    experts: list[Comparison]
    """each expert alone, on one of the prompt's hidden states"""

    @property
    def worst_expert(self) -> int:
        """The expert that fails, or is farthest from float32."""
        key = lambda number: (bool(self.experts[number].problem), self.experts[number].total)  # noqa: E731
        return max(range(len(self.experts)), key=key)

    @property
    def problem(self) -> str:
        """Why the layer does not pass; empty where it does."""
        failed = [number for number, found in enumerate(self.experts) if found.problem]
        if not failed:
            return self.prompt.problem
        text = f"expert {failed[0]}: {self.experts[failed[0]].problem}"
        return f"{text} (and {len(failed) - 1} more experts)" if len(failed) > 1 else text


def verify_layers(
    model: Any, inputs: Mapping[int, Inputs], reference: Reference, bounds: Bounds | None = None
) -> Iterator[LayerResult]:
    """Check the layers that there are inputs for, while no generation runs.

    The engine's LoRA is taken away for the base and put back. Where it is merged into the weights, base and effect cannot
    be told apart: both are then the whole.

    Args:
        model: loaded with KT experts, its adapters applied.
        inputs: from :func:`~llamafactory_kt.tools.verify.states.record_inputs`.
    """
    state = kt_state(model)
    for wrapper in state.wrappers:
        if wrapper.layer_idx in inputs:
            chosen = bounds or wrapper.engine.bounds
            yield _verify(state, wrapper, inputs[wrapper.layer_idx], reference, chosen)


def _verify(state: KTState, wrapper: Any, given: Inputs, reference: Reference, bounds: Bounds) -> LayerResult:
    tokens = len(given.index)
    alone = _each_alone(given, wrapper.num_experts)
    hidden, index, weights = (torch.cat(pair) for pair in zip(_parts(given), _parts(alone), strict=True))
    merged = state.merged is not None
    with state.lock.exchange(), torch.inference_mode():
        with_lora = wrapper.engine.forward(hidden, index, weights)
        undo = wrapper.engine.set_lora(None)
        try:
            found = wrapper.engine.forward(hidden, index, weights), with_lora
        finally:
            undo()
    with torch.inference_mode():
        wanted = reference.compute(wrapper.layer_idx, hidden, index, weights)
    if merged:
        wanted = wanted[1], wanted[1]

    def rows(part: slice, rounding: float = 0.0) -> Comparison:
        return compare((found[0][part], found[1][part]), (wanted[0][part], wanted[1][part]), bounds, rounding)

    prompt = rows(slice(0, tokens))
    experts = [
        rows(slice(row, row + 1), min(prompt.base, bounds.relative))
        for row in range(tokens, tokens + wrapper.num_experts)
    ]
    return LayerResult(wrapper.layer_idx, wrapper.engine.name, prompt, experts)


def _parts(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return inputs.hidden, inputs.index, inputs.weights.float()


def _each_alone(given: Inputs, experts: int) -> Inputs:
    """A row for each expert, which gets weight 1, and the others in the row none: no prompt reaches all experts."""
    tokens, top_k = given.index.shape
    numbers = torch.arange(experts)
    weights = torch.zeros(experts, top_k)
    weights[:, 0] = 1
    index = (numbers[:, None] + torch.arange(top_k)) % experts
    return Inputs(given.hidden[numbers % tokens], index, weights)
