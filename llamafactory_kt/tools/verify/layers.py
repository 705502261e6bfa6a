"""Record what each layer's experts get for a prompt, and compare what the engine computes from it with float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...model.state import KTState, kt_state
from .compare import Comparison, compare
from .reference import Reference


@dataclass(frozen=True)
class ExpertsInputs:
    """The arguments of one experts module for a prompt of T tokens, on the CPU."""

    hidden: torch.Tensor
    """[T, H], in the model's dtype"""
    index: torch.Tensor
    """[T, K] int64"""
    weights: torch.Tensor
    """[T, K], float"""


@dataclass(frozen=True)
class LayerResult:
    """The comparisons of one layer."""

    layer: int
    engine: str
    prompt: Comparison
    """the prompt's tokens, routed as the model's router did"""
    experts: list[Comparison]
    """each expert alone, on one of the prompt's hidden states"""

    @property
    def worst_expert(self) -> int:
        """The expert that fails, or is farthest from float32."""
        key = lambda number: (bool(self.experts[number].problem), self.experts[number].total)  # noqa: E731
        return max(range(len(self.experts)), key=key)

    @property
    def worst(self) -> Comparison:
        """The comparison of :attr:`worst_expert`."""
        return self.experts[self.worst_expert]

    @property
    def problem(self) -> str:
        """Why the layer fails; empty if it passes."""
        failed = [number for number, found in enumerate(self.experts) if found.problem]
        if not failed:
            return self.prompt.problem
        text = f"expert {failed[0]}: {self.experts[failed[0]].problem}"
        return f"{text} (and {len(failed) - 1} more experts)" if len(failed) > 1 else text


def record_inputs(model: Any, token_ids: Sequence[int]) -> dict[int, ExpertsInputs]:
    """Run the model over a prompt once and keep the inputs of each layer's experts.

    Returns:
        layer -> its inputs.
    """
    inputs: dict[int, ExpertsInputs] = {}

    def keep(module: Any, arguments: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = {**dict(zip(names, arguments, strict=False)), **named}
        inputs[module.layer_idx] = ExpertsInputs(*(given[name].detach().cpu().clone() for name in names))

    handles = [wrapper.register_forward_pre_hook(keep, with_kwargs=True) for wrapper in kt_state(model).wrappers]
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(token_ids)], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def verify_layers(model: Any, inputs: Mapping[int, ExpertsInputs], reference: Reference) -> Iterator[LayerResult]:
    """Verify the layers in ``inputs``; no generation may run.

    The engine's LoRA is removed to compute the base output, and put back. If it is merged into the weights, base and effect
    cannot be told apart; both comparisons then use the merged output.

    Args:
        model: loaded with KT experts, its adapters applied.
        inputs: from :func:`record_inputs`.
    """
    state = kt_state(model)
    for wrapper in state.wrappers:
        if wrapper.layer_idx in inputs:
            yield _verify(state, wrapper, inputs[wrapper.layer_idx], reference)


def _verify(state: KTState, wrapper: Any, given: ExpertsInputs, reference: Reference) -> LayerResult:
    tokens, experts, bounds = len(given.index), wrapper.num_experts, wrapper.engine.bounds
    alone = _each_alone(given, experts)
    hidden, index = torch.cat([given.hidden, alone.hidden]), torch.cat([given.index, alone.index])
    weights = torch.cat([given.weights.float(), alone.weights])
    with state.lock.exchange(), torch.inference_mode():
        with_lora = wrapper.whole.forward(hidden, index, weights)
        undo = wrapper.whole.set_lora(None)
        try:
            found = wrapper.whole.forward(hidden, index, weights), with_lora
        finally:
            undo()
    with torch.inference_mode():
        wanted = reference.compute(wrapper.layer_idx, hidden, index, weights)
    if state.merged is not None:
        wanted = wanted[1], wanted[1]

    def rows(part: slice, rounding: float = 0.0) -> Comparison:
        return compare((found[0][part], found[1][part]), (wanted[0][part], wanted[1][part]), bounds, rounding)

    prompt = rows(slice(0, tokens))
    rounding = min(prompt.base, bounds.relative)
    each = [rows(slice(row, row + 1), rounding) for row in range(tokens, tokens + experts)]
    return LayerResult(wrapper.layer_idx, wrapper.engine.name, prompt, each)


def _each_alone(given: ExpertsInputs, experts: int) -> ExpertsInputs:
    """One row per expert: that expert has weight 1, the others in the row 0. No prompt reaches all experts."""
    tokens, top_k = given.index.shape
    numbers = torch.arange(experts)
    weights = torch.zeros(experts, top_k)
    weights[:, 0] = 1
    index = (numbers[:, None] + torch.arange(top_k)) % experts
    return ExpertsInputs(given.hidden[numbers % tokens], index, weights)
