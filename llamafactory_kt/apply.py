"""Applying adapters to a model with KT experts: PEFT gets its part, the experts get theirs, nothing is left.

:func:`load_moe_lora_from_adapter` is the seam between adapter files and experts. What a model has of adapters is
exchanged as a whole, while no generation runs: a failure leaves it as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from .adapters import Adapter, AdapterSet, open_adapters
from .checkpoint.opening import check_layers, fit_adapters
from .decoding.prepare import changing_layers
from .ground.errors import KTMemoryError, KTModelError, name_some
from .ground.machine import available_memory, gib
from .model.state import KTState, LoadReport, kt_state, plain_model
from .peft_side.part import PeftPart
from .peft_side.swap import exchange_peft_layers, merge_dense_part

__all__ = ["LoadReport", "apply_adapter", "choose_adapter", "load_moe_lora_from_adapter", "switch_adapter"]

logger = logging.getLogger(__name__)

Adapters = AdapterSet | Adapter | str | Path | Sequence[str | Path | Adapter] | None
"""a local adapter directory, several, or opened ones"""
Parts = list[tuple[Adapter, PeftPart]]


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
    report = _report(adapters)

    def exchange() -> None:
        _exchange_experts(state, adapters)
        state.held.clear()  # as in _exchange
        state.expert_adapters, state.report = adapters, _with_experts_of(state, report)

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
    parts = _fit(model, state, adapters, scope)

    def merge() -> LoadReport:
        merge_dense_part(model, parts)
        report = replace(_report(adapters, parts), merged=True)
        state.adapters, state.expert_adapters, state.report = adapters, adapters, report
        return report

    report = state.lock.alone(merge)
    logger.info("Merged the adapter into the weights: it costs nothing now, and cannot be exchanged or taken away.")
    return model, report


def _exchange(model: Any, state: KTState, adapters: AdapterSet, scope: str) -> tuple[nn.Module, LoadReport]:
    base = plain_model(model)
    _check_experts(state, adapters)
    parts = _fit(base, state, adapters, scope)

    def exchange() -> tuple[nn.Module, LoadReport]:
        with _changing(base, state):
            wrapped, _ = _put(model, state, adapters, parts)
            state.held.clear()  # it refers to kernels that a larger rank has replaced
        return wrapped, _report(adapters, parts)

    return state.lock.alone(exchange)


def choose_adapter(model: nn.Module, name: str | None = None) -> LoadReport | None:
    """Put one of ``KTExpertsConfig.choices`` in place, as :func:`switch_adapter` does, but in the time of a token or two if it was there
    before: what is exchanged for another choice stays in memory.

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
    chosen = choice(state, name)
    if is_in_place(state, chosen):
        return state.report
    _check_exchangeable(state)
    held = chosen in state.held
    parts: Parts = []
    if not held:
        for adapter in chosen.adapters:
            adapter.check_unchanged()
        parts = _fit(base, state, chosen, state.lora_scope)

    def exchange() -> None:
        left = state.adapters
        whole = is_in_place(state, left) and left in (state.requested, *state.choices.values())
        with _changing(base, state):
            _, back = _put(model, state, AdapterSet() if held else chosen, parts)
            if held:
                try:
                    state.held[chosen]()
                except BaseException:
                    back()
                    raise
            if whole:
                state.held[left] = back

    state.lock.alone(exchange)
    return state.report


def choice(state: KTState, name: str | None) -> AdapterSet:
    """The adapters that a name of ``KTExpertsConfig.choices`` stands for; None: those that the load was given.

    Raises:
        KTModelError: There is no such name.
    """
    if name is None:
        return state.requested
    if name not in state.choices:
        raise KTModelError(
            f"There is no adapter called {name!r}; kt_adapters has {name_some(state.choices) or 'none'}."
        )
    return state.choices[name]


def is_in_place(state: KTState, adapters: AdapterSet) -> bool:
    """Whether a model computes with just these adapters."""
    return adapters == state.adapters == state.expert_adapters


def _changing(base: Any, state: KTState) -> AbstractContextManager[None]:
    return changing_layers(
        base, prepared=state.optimized, copy=not state.options.mapped, bits=state.options.dense_bits,
        cached=state.cached_dense,
    )  # fmt: skip


def _put(model: Any, state: KTState, adapters: AdapterSet, parts: Parts) -> tuple[nn.Module, Callable[[], None]]:
    """Put adapters in place; returns the model in PEFT's wrapper, and how to put back what was there, whatever is there then."""
    base = plain_model(model)
    before = state.adapters, state.expert_adapters, state.report
    inner = model.base_model if model is not base else None
    wrapped, undo_layers = exchange_peft_layers(base, parts, state.own_weights)
    try:
        undo_experts = _exchange_experts(state, adapters)
    except BaseException:
        undo_layers()
        raise
    if model is not base and wrapped is not base:
        model.base_model = wrapped.base_model  # PEFT's wrapper that the caller holds
    state.adapters, state.expert_adapters = adapters, adapters
    state.report = _report(adapters, parts) if adapters.adapters else None

    def back() -> None:
        undo_experts()
        undo_layers()
        if inner is not None:
            model.base_model = inner
        state.adapters, state.expert_adapters, state.report = before

    return wrapped, back


def _fit(base: Any, state: KTState, adapters: AdapterSet, scope: str) -> Parts:
    parts = fit_adapters(base, state.shapes, adapters, scope, finite=True)
    for adapter, part in parts:
        _log_split(adapter, part)
    return parts


def _check_experts(state: KTState, adapters: AdapterSet) -> None:
    adapters.check_fits(state.shapes)
    needed = sum(wrapper.engine.nbytes_for_rank(adapters.rank(wrapper.layer_idx)) for wrapper in state.wrappers)
    if needed and needed > (free := available_memory()):
        raise KTMemoryError(
            f"The adapter's rank is larger than the kernels were built for; larger ones need {gib(needed)} and {gib(free)} "
            "are free. Load the model with this adapter, or with a larger lora_rank in KTExpertsConfig."
        )


def _exchange_experts(state: KTState, adapters: AdapterSet) -> Callable[[], None]:
    for adapter in adapters.adapters:
        if adapter.layers:
            logger.info("Loading MoE LoRA from %s", adapter.expert_file)
    each: list[Callable[[], None]] = []

    def undo() -> None:
        for back in reversed(each):
            back()

    try:
        for wrapper in state.wrappers:
            each.append(wrapper.whole.set_lora(adapters.read_layer(wrapper.layer_idx, wrapper.info.shape)))
    except BaseException:
        undo()
        raise
    for adapter in adapters.adapters:
        if adapter.layers:
            logger.info("Loaded MoE LoRA into %d KT wrappers from %s", len(adapter.layers), adapter.directory)
    return undo


def _report(adapters: AdapterSet, parts: Sequence[tuple[Adapter, PeftPart]] = ()) -> LoadReport:
    every = adapters.adapters
    return LoadReport(
        adapter=", ".join(str(adapter.directory) for adapter in every),
        format=", ".join(dict.fromkeys(adapter.format for adapter in every)),
        total=sum(len(adapter.store.infos) for adapter in every),
        experts=sum(len(adapter.expert_names) for adapter in every),
        peft=sum(len(part.tensors) for _, part in parts),
        left_out=sum(len(part.left_out) for _, part in parts),
        layers=tuple(adapters.layers),
        max_rank=max((adapters.rank(layer) for layer in adapters.layers), default=0),
        expert_params=sum(prod(a.store.infos[name].shape) for a in every for name in a.expert_names),
    )


def _with_experts_of(state: KTState, experts: LoadReport) -> LoadReport | None:
    """What the model has, once the experts' part alone is that of another adapter."""
    if state.report is None or not state.adapters.adapters:
        return experts if experts.experts else None
    whole = _report(state.adapters)
    others = "" if experts.adapter == whole.adapter else f", experts of {experts.adapter or 'none'}"
    return replace(
        state.report, adapter=whole.adapter + others, total=whole.total - whole.experts + experts.experts,
        experts=experts.experts, layers=experts.layers, max_rank=experts.max_rank, expert_params=experts.expert_params,
    )  # fmt: skip


def _log_split(adapter: Adapter, part: PeftPart) -> None:
    more = f" ({len(part.exact)} other modules added by exact name)" if part.exact else ""
    experts = len(adapter.expert_names)
    rest = (
        f"; the {experts} tensors of routed experts go to the KT experts" if experts else "; no LoRA on routed experts"
    )
    logger.info(
        "KT mode: Loading only Attention LoRA. Original targets: %s, Filtered: %s%s%s",
        adapter.settings.target_modules, part.filtered, more, rest,
    )  # fmt: skip
    if part.left_out:
        logger.warning(
            "kt_lora_scope: attention leaves out %d of the adapter's %d tensors (shared experts and dense MLP layers); "
            "answers differ from the trained model's. kt_lora_scope: all applies them.",
            len(part.left_out), len(adapter.store.infos),
        )  # fmt: skip
