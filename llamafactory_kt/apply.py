"""Applying adapters to a model with KT experts: PEFT gets its part, the experts get theirs, nothing is left.

:func:`load_moe_lora_from_adapter` is the seam between adapter files and experts. What a model has of adapters is
exchanged as a whole, while no generation runs: a failure leaves it as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .adapters import Adapter, AdapterSet, open_adapters
from .checkpoint.opening import check_layers
from .exchange import Parts, changing, exchange_experts, fit, put, report_of, with_experts_of
from .ground.errors import KTMemoryError, KTModelError
from .ground.machine import available_memory, gib
from .model.state import KTState, LoadReport, kt_state, plain_model
from .peft_side.swap import merge_dense_part

__all__ = ["LoadReport", "apply_adapter", "choose_adapter", "load_moe_lora_from_adapter", "switch_adapter"]

logger = logging.getLogger(__name__)

Adapters = AdapterSet | Adapter | str | Path | Sequence[str | Path | Adapter] | None
"""a local adapter directory, several, or opened ones"""


def load_moe_lora_from_adapter(model: nn.Module, adapter_path: Adapters) -> LoadReport:
    """Load the routed-expert LoRA of an adapter (or the sum of several) into the experts, in place of what they had.

    May be called again with any other adapter: layers it does not mention go back to the base model. Waits for
    generations that run.

    Args:
        model: a model with KT experts, plain or wrapped by PEFT.
        adapter_path: a local adapter directory, or several.

    Raises:
        KTAdapterError: The adapter is broken or made for another model; the model keeps the LoRA it had.
        KTMemoryError: Its rank needs larger kernels than there is memory for; likewise.
        KTModelError: The model has no KT experts, or has its adapter merged.
    """
    state = kt_state(model)
    _check_exchangeable(state)
    adapters = open_adapters(adapter_path)
    _check_experts(state, adapters)
    check_layers(plain_model(model), adapters)
    for adapter in adapters.adapters:
        adapter.check_finite(adapter.expert_names)
    report = report_of(adapters)

    def exchange() -> None:
        exchange_experts(state, adapters)
        state.held.clear()  # as in _exchange
        state.expert_adapters, state.report = adapters, with_experts_of(state, report)

    state.lock.alone(exchange)
    return report


def apply_adapter(model: nn.Module, adapter_path: Adapters, scope: str = "all") -> tuple[nn.Module, LoadReport]:
    """Apply whole adapters to a plain model: PEFT's part through PEFT, the experts' part in the experts.

    Where the experts had the adapter merged into their weights while they were loaded, PEFT merges its part too.

    Args:
        model: a plain model with KT experts.
        adapter_path: a local adapter directory, or several, whose LoRA add up.
        scope: ``all``, or ``attention``: without LoRA on shared experts and dense MLP layers, as early KTransformers
            chats did; what is left out is counted in a warning.

    Returns:
        The model (wrapped by PEFT if there is a part for it) and the report.

    Raises:
        KTAdapterError: Any tensor could not be consumed; the model is as it was.
        KTMemoryError: A rank needs larger kernels than there is memory for; likewise.
        KTModelError: The model already carries an adapter, or its experts had another one merged.
    """
    state, adapters = kt_state(model), open_adapters(adapter_path)
    if state.merged is not None and _files(adapters) == _files(state.merged) and not state.adapters.adapters:
        return _merge(model, state, adapters, scope)
    _check_exchangeable(state)
    if hasattr(model, "peft_config") or state.adapters.adapters:
        raise KTModelError(
            f"{type(model).__name__} already carries an adapter. switch_adapter replaces it; load_moe_lora_from_adapter "
            "replaces only the experts' part."
        )
    return _exchange(model, state, adapters, scope)


def switch_adapter(model: nn.Module, adapter_path: Adapters, scope: str = "all") -> LoadReport:
    """Put another adapter (or the sum of several, or none) in place of what a running model has, in one step.

    Waits for generations that run; those that come later wait for it: each sees the old adapter or the new one. A load
    that fails leaves the old one in place.

    Args:
        model: a model with KT experts, plain or wrapped by PEFT; it is changed in place.
        adapter_path: a local adapter directory, or several; None for the base model.
        scope: as in :func:`apply_adapter`.

    Raises:
        KTAdapterError: The adapter is broken, or not one of this model.
        KTMemoryError: Its rank needs larger kernels than there is memory for.
        KTModelError: The model has no KT experts, or has its adapter merged.
        RuntimeError: The calling thread is generating with this model.
    """
    state = kt_state(model)
    _check_exchangeable(state)
    return _exchange(model, state, open_adapters(adapter_path), scope)[1]


def choose_adapter(model: nn.Module, name: str | None = None) -> LoadReport | None:
    """Put one of ``KTExpertsConfig.choices`` in place, as :func:`switch_adapter` does.

    What it takes the place of stays in memory, and comes back without being read again.

    Args:
        model: as for :func:`switch_adapter`.
        name: None for the adapters that the load was given.

    Returns:
        What became of its tensors; None for the model alone.

    Raises:
        KTAdapterError: Its files have changed since the load, or are gone. What was in place stays.
        KTMemoryError: There is no memory for it; likewise.
        KTModelError: There is no such choice.
        RuntimeError: The calling thread is generating with this model.
    """
    state, base = kt_state(model), plain_model(model)
    chosen = state.choice(name)
    if state.is_in_place(chosen):
        return state.report
    _check_exchangeable(state)
    return_to, parts = state.held.get(chosen), Parts()
    if return_to is None:
        for adapter in chosen.adapters:
            adapter.check_unchanged()
        parts = fit(base, state, chosen, state.lora_scope)

    def exchange() -> None:
        left = state.adapters
        whole = state.is_in_place(left) and left in (state.requested, *state.choices.values())
        with changing(base, state):
            _, back = put(model, state, AdapterSet() if return_to else chosen, parts)
            if return_to:
                try:
                    return_to()
                except BaseException:
                    back()
                    raise
            if whole:
                state.held[left] = back

    state.lock.alone(exchange)
    return state.report


def _check_exchangeable(state: KTState) -> None:
    """Raise KTModelError if the experts' LoRA is in their weights, where it can be neither exchanged nor taken away."""
    if state.merged is None:
        return
    adapters = (
        ", ".join(str(adapter.directory or adapter.expert_file) for adapter in state.merged.adapters) or "no adapter"
    )
    reason = "kt_merge_adapter: true" if state.engine.computes_lora else f"{state.engine.name} computes no LoRA"
    raise KTModelError(
        f"The experts were loaded with {adapters} merged into their weights ({reason}); their LoRA can no longer be "
        "changed. Load the model again with the other adapter, or with an engine that keeps LoRA apart and "
        "without kt_merge_adapter."
    )


def _files(adapters: AdapterSet) -> list[tuple[Path, Path]]:
    return [(Path(a.store.path).resolve(), Path(a.expert_file).resolve()) for a in adapters.adapters]


def _merge(model: Any, state: KTState, adapters: AdapterSet, scope: str) -> tuple[nn.Module, LoadReport]:
    parts = fit(model, state, adapters, scope)

    def merge() -> LoadReport:
        merge_dense_part(model, parts)
        report = replace(report_of(adapters, parts), merged=True)
        state.adapters, state.expert_adapters, state.report = adapters, adapters, report
        return report

    report = state.lock.alone(merge)
    logger.info("Merged the adapter into the weights: it costs nothing now, and cannot be exchanged or taken away.")
    return model, report


def _exchange(model: Any, state: KTState, adapters: AdapterSet, scope: str) -> tuple[nn.Module, LoadReport]:
    base = plain_model(model)
    _check_experts(state, adapters)
    parts = fit(base, state, adapters, scope)

    def exchange() -> tuple[nn.Module, LoadReport]:
        with changing(base, state):
            wrapped, _ = put(model, state, adapters, parts)
            state.held.clear()  # they may refer to kernels that a larger rank has replaced
        return wrapped, report_of(adapters, parts)

    return state.lock.alone(exchange)


def _check_experts(state: KTState, adapters: AdapterSet) -> None:
    adapters.check_fits(state.shapes)
    needed = sum(wrapper.engine.nbytes_for_rank(adapters.rank(wrapper.layer_idx)) for wrapper in state.wrappers)
    if needed and needed > (free := available_memory()):
        raise KTMemoryError(
            f"The adapter's rank is larger than the kernels were built for; larger ones need {gib(needed)} and {gib(free)} "
            "are free. Load the model with this adapter, or with a larger lora_rank in KTExpertsConfig."
        )
