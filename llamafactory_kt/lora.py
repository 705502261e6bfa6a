"""Applying an adapter to a model with KT experts: PEFT gets its part, the experts get theirs, nothing is left.

:func:`load_moe_lora_from_adapter` is the seam between adapter files and experts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from .adapters import Adapter, ExpertLora, open_adapter
from .errors import KTModelError
from .peft_part import PeftPart, apply_peft_part, plan_peft_part

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What became of an adapter's tensors."""

    adapter: str
    format: str
    total: int
    """tensors in the file"""
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
    """LoRA parameters of the experts, as the file has them"""

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


def load_moe_lora_from_adapter(model: nn.Module, adapter_path: str | Path | Adapter) -> LoadReport:
    """Load an adapter's routed-expert LoRA into the model's experts, in place of what they had.

    May be called again with any other adapter: layers it does not mention go back to the base model. Everything is
    read and checked before the first layer changes.

    Args:
        model: a model with KT experts, plain or wrapped by PEFT.
        adapter_path: a local adapter directory.

    Raises:
        KTAdapterError: The adapter is broken or made for another model; the model keeps the LoRA it had.
        KTModelError: The model has no KT experts.
    """
    wrappers = kt_wrappers(model)
    adapter = adapter_path if isinstance(adapter_path, Adapter) else open_adapter(adapter_path)
    adapter.check_fits({wrapper.layer_idx: wrapper.info.shape for wrapper in wrappers})
    adapter.check_finite(adapter.expert_names)
    layers = adapter.layers
    if layers:
        logger.info("Loading MoE LoRA from %s", adapter.expert_file)
    for wrapper in wrappers:
        lora: ExpertLora | None = None
        if wrapper.layer_idx in layers:
            lora = adapter.read_layer(wrapper.layer_idx, wrapper.info.shape)
        wrapper.engine.set_lora(lora)
    if layers:
        logger.info("Loaded MoE LoRA into %d KT wrappers from %s", len(layers), adapter.directory)
    return LoadReport(
        adapter=str(adapter.directory),
        format=adapter.format,
        total=len(adapter.store.infos),
        experts=len(adapter.expert_names),
        peft=0,
        left_out=0,
        layers=tuple(layers),
        max_rank=max((adapter.rank(layer) for layer in layers), default=0),
        expert_params=sum(prod(adapter.store.infos[name].shape) for name in adapter.expert_names),
    )


def apply_adapter(
    model: nn.Module, adapter_path: str | Path | Adapter, scope: str = "all"
) -> tuple[nn.Module, LoadReport]:
    """Apply a whole adapter: PEFT's part through PEFT, the experts' part through :func:`load_moe_lora_from_adapter`.

    Args:
        model: a plain model with KT experts.
        adapter_path: a local adapter directory.
        scope: ``all``, or ``attention``: without LoRA on shared experts and dense MLP layers, as early KTransformers
            chats did; what is left out is counted in a warning.

    Returns:
        The model (wrapped by PEFT if the adapter has a part for it) and the report.

    Raises:
        KTAdapterError: Any tensor could not be consumed; the model is then unusable and must be loaded again if PEFT
            had begun.
        KTModelError: The model already carries an adapter.
    """
    if hasattr(model, "peft_config") or getattr(model, "_kt_adapter_applied", False):
        raise KTModelError(
            f"{type(model).__name__} already carries an adapter. Load the model again; to change the experts' part alone, "
            "call load_moe_lora_from_adapter."
        )
    adapter = adapter_path if isinstance(adapter_path, Adapter) else open_adapter(adapter_path)
    part = plan_peft_part(model, adapter, scope)
    adapter.check_finite(part.tensors)
    _log_split(adapter, part)
    model = apply_peft_part(model, adapter, part)
    report = load_moe_lora_from_adapter(model, adapter)
    model._kt_adapter_applied = True  # type: ignore[assignment]
    return model, replace(report, peft=len(part.tensors), left_out=len(part.left_out))


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
