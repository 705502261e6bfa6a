"""A configuration's adapters: can they be read, and do they fit the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ...ground.errors import KTError, describe
from .finding import error, ok, warning

if TYPE_CHECKING:
    from ...adapters import AdapterSet
    from ...checkpoint.opening import MoEModel

RESIZE = ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config")
"""keys with which LLaMA-Factory resizes embeddings"""


def adapters_of(args: Any, moe: MoEModel | None) -> Any:
    """Check headers and, with a model, fit; returns the adapters that can be applied."""
    from ...adapters import AdapterSet
    from ...integration.chat_config import open_configured

    if not args.adapter_name_or_path and not args.kt_moe_lora_path:
        yield ok("adapter", "none")
        return AdapterSet()
    return (yield from _fitting("adapter", partial(open_configured, args), args, moe))


def choices_of(args: Any, moe: MoEModel | None) -> Any:
    """The same for those in ``kt_adapters``; returns a list."""
    from ...integration.chat_config import open_choice

    found = []
    for name in args.kt_adapters or {}:
        found.append((yield from _fitting(f"adapter {name}", partial(open_choice, args, name), args, moe)))
    return found


def _fitting(check: str, opened: Callable[[], AdapterSet], args: Any, moe: MoEModel | None) -> Any:
    """What :func:`adapters_of` says of one set of adapters."""
    from ...adapters import AdapterSet

    try:
        adapters = opened()
        if moe is None:
            for adapter in adapters.adapters:
                yield ok(check, f"{adapter.directory}: {adapter.format}; without a model its fit is not known")
            return adapters
        resizes = any(getattr(args, key, None) for key in RESIZE)
        parts = moe.fit(adapters, args.kt_lora_scope, resizes=resizes)
    except KTError as problem:
        yield error(check, describe(problem), "llamafactory-kt inspect shows what the adapter holds.")
        return AdapterSet()
    for adapter, part in parts:
        consumed = f"{len(part.tensors)} tensors to PEFT, {len(adapter.expert_names)} to the experts"
        text = f"{adapter.directory}: {adapter.format}; {consumed}; expert LoRA in {len(adapter.layers)} layers"
        if part.left_out:
            text = f"{text}; {len(part.left_out)} left out"
            yield warning(check, text, "kt_lora_scope: all applies the whole adapter.")
        elif not adapter.layers:
            yield warning(check, text, "It changes no routed expert. If it should, train it with the experts.")
        else:
            yield ok(check, text)
    return adapters
