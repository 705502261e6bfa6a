"""Exchanging what a model has of adapters, under its lock: PEFT's layers, the experts' LoRA, and the state that says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from .adapters import Adapter, AdapterSet
from .checkpoint.opening import fit_adapters
from .decoding.prepare import changing_layers
from .model.state import KTState, LoadReport, plain_model
from .peft_side.part import PeftPart
from .peft_side.swap import exchange_peft_layers

logger = logging.getLogger(__name__)

Parts = list[tuple[Adapter, PeftPart]]


def fit(base: Any, state: KTState, adapters: AdapterSet, scope: str) -> Parts:
    """Each adapter with PEFT's part of it, after checking that they fit the plain model, their values too; changes nothing.

    Raises:
        KTAdapterError: They do not.
    """
    parts = fit_adapters(base, state.shapes, adapters, scope, finite=True)
    for adapter, part in parts:
        _log_split(adapter, part)
    return parts


def changing(base: Any, state: KTState) -> AbstractContextManager[None]:
    """Around what changes the plain model's layers: they are prepared for inference again where they were."""
    return changing_layers(
        base, prepared=state.optimized, copy=not state.options.mapped, bits=state.options.dense_bits,
        cached=state.cached_dense,
    )  # fmt: skip


def put(model: Any, state: KTState, adapters: AdapterSet, parts: Parts) -> tuple[nn.Module, Callable[[], None]]:
    """Put adapters in place; returns the model in PEFT's wrapper, and how to put back what was there, whatever is there then."""
    base = plain_model(model)
    before = state.adapters, state.expert_adapters, state.report
    inner = model.base_model if model is not base else None
    wrapped, undo_layers = exchange_peft_layers(base, parts, state.own_weights)
    try:
        undo_experts = exchange_experts(state, adapters)
    except BaseException:
        undo_layers()
        raise
    if model is not base and wrapped is not base:
        model.base_model = wrapped.base_model  # PEFT's wrapper that the caller holds
    state.adapters, state.expert_adapters = adapters, adapters
    state.report = report_of(adapters, parts) if adapters.adapters else None

    def back() -> None:
        undo_experts()
        undo_layers()
        if inner is not None:
            model.base_model = inner
        state.adapters, state.expert_adapters, state.report = before

    return wrapped, back


def exchange_experts(state: KTState, adapters: AdapterSet) -> Callable[[], None]:
    """Give all experts the LoRA of these adapters, or, after an error, the old one; returns how to put the old one back."""
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


def report_of(adapters: AdapterSet, parts: Sequence[tuple[Adapter, PeftPart]] = ()) -> LoadReport:
    """What becomes of the tensors of these adapters, of which PEFT has these parts."""
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


def with_experts_of(state: KTState, experts: LoadReport) -> LoadReport | None:
    """What the model has, once the experts' part alone is that of another adapter."""
    if state.report is None or not state.adapters.adapters:
        return experts if experts.experts else None
    whole = report_of(state.adapters)
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
