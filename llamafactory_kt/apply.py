"""Applying adapters to a model with KT experts: PEFT gets its part, the experts get theirs, nothing is left.

:func:`load_moe_lora_from_adapter` is the seam between adapter files and experts. What a model has of adapters is
exchanged as a whole, while no generation runs: a failure leaves it as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from .adapters import Adapter, AdapterSet, open_adapters
from .decoding.prepare import changing_layers
from .engines.ktkernel.methods import METHODS
from .ground.errors import KTMemoryError, KTModelError
from .ground.machine import available_memory, gib
from .peft_side.split import PeftPart, check_peft_part
from .peft_side.swap import exchange_peft_layers, merge_peft_layers, peft_reads_weights

logger = logging.getLogger(__name__)

Adapters = AdapterSet | Adapter | str | Path | Sequence[str | Path | Adapter] | None
"""a local adapter directory, several, or opened ones"""


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of one adapter, or of several together."""

    adapter: str
    format: str
    total: int
    """tensors in the files"""
    experts: int
    """tensors consumed by the experts"""
    peft: int
    """tensors consumed by PEFT"""
    left_out: int
    """tensors a narrow ``kt_lora_scope`` left out"""
    layers: tuple[int, ...]
    """layers whose experts got LoRA"""
    max_rank: int
    expert_params: int
    """LoRA parameters of the experts, as the files have them"""
    merged: bool = False
    """whether they were added to the weights for good"""

    def __str__(self) -> str:
        text = f"consumed {self.experts + self.peft} of {self.total} (PEFT {self.peft}, KT experts {self.experts})"
        if self.left_out:
            text += f", {self.left_out} left out by kt_lora_scope"
        rest = self.total - self.experts - self.peft - self.left_out
        return f"{text}, {rest} are not the experts'" if rest else text


def kt_wrappers(model: Any) -> list[Any]:
    """The model's :class:`KTExperts` in order; PEFT-wrapped models included.

    Raises:
        KTModelError: The model was not loaded with KTExpertsConfig.
    """
    wrappers: list[Any] | None = getattr(model, "_kt_wrappers", None)
    if wrappers is None:
        raise KTModelError(
            f"{type(model).__name__} has no KT experts; load it with quantization_config=KTExpertsConfig() or use_kt: true."
        )
    return wrappers


def plain_model(model: Any) -> Any:
    """Without PEFT's wrapper around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
    wrappers = kt_wrappers(model)
    _check_apart(model)
    adapters = open_adapters(adapter_path)
    _check_experts(wrappers, adapters)
    for adapter in adapters.adapters:
        adapter.check_finite(adapter.expert_names)
    with plain_model(model)._kt_gate.exchange():
        _exchange_experts(wrappers, adapters)
    return _report(adapters)


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
    kt_wrappers(model)
    adapters, merged = open_adapters(adapter_path), plain_model(model)._kt_merged
    if merged is not None and _files(adapters) == _files(merged) and not getattr(model, "_kt_adapter_applied", False):
        return _merge(model, adapters, scope)
    _check_apart(model)
    if hasattr(model, "peft_config") or getattr(model, "_kt_adapter_applied", False):
        raise KTModelError(
            f"{type(model).__name__} already carries an adapter. switch_adapter puts another in its place; to change the "
            "experts' part alone, call load_moe_lora_from_adapter."
        )
    return _exchange(model, adapters, scope)


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
    _check_apart(model)
    return _exchange(model, open_adapters(adapter_path), scope)[1]


def _check_apart(model: Any) -> None:
    """Raise KTModelError if the experts' LoRA is in their weights, where it can be neither exchanged nor taken away."""
    wrappers, merged = kt_wrappers(model), plain_model(model)._kt_merged
    if merged is None:
        return
    adapters = ", ".join(str(adapter.directory or adapter.expert_file) for adapter in merged.adapters) or "no adapter"
    engine = wrappers[0].engine.name
    always = engine in METHODS and not METHODS[engine].lora
    reason = f"{engine} computes no LoRA" if always else "kt_merge_adapter: true"
    raise KTModelError(
        f"The experts were loaded with {adapters} merged into their weights ({reason}), so that no LoRA can be exchanged, added or "
        "taken away any more. Load the model again with the other adapter, or with an engine that keeps LoRA apart and "
        "without kt_merge_adapter."
    )


def _files(adapters: AdapterSet) -> list[tuple[Path, Path]]:
    return [(Path(a.store.path).resolve(), Path(a.expert_file).resolve()) for a in adapters.adapters]


def _plan(base: Any, adapters: AdapterSet, scope: str) -> list[tuple[Adapter, PeftPart]]:
    parts = [(adapter, check_peft_part(base, adapter, scope)) for adapter in adapters.adapters]
    adapters.check_finite()
    for adapter, part in parts:
        _log_split(adapter, part)
    return parts


def _merge(model: Any, adapters: AdapterSet, scope: str) -> tuple[nn.Module, LoadReport]:
    parts = _plan(model, adapters, scope)
    with model._kt_gate.exchange():
        wrapped, _ = exchange_peft_layers(model, parts)
        plain = merge_peft_layers(wrapped)
    model._kt_adapter_applied = True
    logger.info("Merged the adapter into the weights: it costs nothing now, and cannot be exchanged or taken away.")
    return plain, _report(adapters, parts, merged=True)


def _exchange(model: Any, adapters: AdapterSet, scope: str) -> tuple[nn.Module, LoadReport]:
    wrappers, base = kt_wrappers(model), plain_model(model)
    _check_experts(wrappers, adapters)
    parts = _plan(base, adapters, scope)
    weights_read = any(peft_reads_weights(adapter) for adapter in adapters.adapters)
    with base._kt_gate.exchange(), changing_layers(base, weights_read):
        wrapped, undo = exchange_peft_layers(base, parts)
        try:
            _exchange_experts(wrappers, adapters)
        except BaseException:
            undo()
            raise
        if model is not base and wrapped is not base:
            model.base_model = wrapped.base_model  # PEFT's wrapper that the caller holds
        base._kt_adapter_applied = bool(adapters.adapters)
    return wrapped, _report(adapters, parts)


def _check_experts(wrappers: Sequence[Any], adapters: AdapterSet) -> None:
    adapters.check_fits({wrapper.layer_idx: wrapper.info.shape for wrapper in wrappers})
    needed = sum(wrapper.engine.nbytes_for_rank(adapters.rank(wrapper.layer_idx)) for wrapper in wrappers)
    if needed and needed > (free := available_memory()):
        raise KTMemoryError(
            f"The adapter's rank is larger than the kernels were built for; larger ones need {gib(needed)} and {gib(free)} "
            "are free. Load the model with this adapter, or with a larger lora_rank in KTExpertsConfig."
        )


def _exchange_experts(wrappers: Sequence[Any], adapters: AdapterSet) -> None:
    for adapter in adapters.adapters:
        if adapter.layers:
            logger.info("Loading MoE LoRA from %s", adapter.expert_file)
    undo: list[Callable[[], None]] = []
    try:
        for wrapper in wrappers:
            undo.append(wrapper.engine.set_lora(adapters.read_layer(wrapper.layer_idx, wrapper.info.shape)))
    except BaseException:
        for back in reversed(undo):
            back()
        raise
    for adapter in adapters.adapters:
        if adapter.layers:
            logger.info("Loaded MoE LoRA into %d KT wrappers from %s", len(adapter.layers), adapter.directory)


def _report(adapters: AdapterSet, parts: Sequence[tuple[Adapter, PeftPart]] = (), merged: bool = False) -> LoadReport:
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
        merged=merged,
    )


def _log_split(adapter: Adapter, part: PeftPart) -> None:
    original = adapter.settings.target_modules
    more = f" ({len(part.exact)} other modules added by exact name)" if part.exact else ""
    logger.info(
        "KT mode: Loading only Attention LoRA. Original targets: %s, Filtered: %s%s", original, part.filtered, more
    )
    if part.left_out:
        logger.warning(
            "kt_lora_scope: attention leaves out %d of the adapter's %d tensors (shared experts and dense MLP layers); "
            "answers differ from the trained model's. kt_lora_scope: all applies them.",
            len(part.left_out), len(adapter.store.infos),
        )  # fmt: skip
