"""``llamafactory.hparams.model_args``: ModelArguments gets the kt_* fields."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

from ..ground.errors import KTHookError
from ..settings.keys import KTArguments
from .patching import check_stock, is_patched, replace, versions


def patch(module: ModuleType) -> None:
    """Replace ModelArguments by a subclass of the same name, before the parser builds its lists from it."""
    if is_patched(module):
        return
    check_stock()
    stock: Any = getattr(module, "ModelArguments", None)
    if not hasattr(stock, "__dataclass_fields__") or "use_kt" not in {f.name for f in dataclasses.fields(stock)}:
        raise KTHookError(
            f"{module.__name__}.ModelArguments cannot be hooked: found {stock!r}, expected a dataclass with the field "
            f"use_kt. Installed: {versions()}."
        )

    namespace = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
    }
    extended: Any = dataclasses.dataclass(type("ModelArguments", (KTArguments, stock), namespace))
    replace(module, ModelArguments=extended)
    for name in ("llamafactory.hparams", "llamafactory.hparams.parser"):  # imported before us
        other = sys.modules.get(name)
        if other is not None and getattr(other, "ModelArguments", None) is stock:
            _follow(other, stock, extended)


def _follow(module: ModuleType, stock: Any, extended: Any) -> None:
    for name, value in list(vars(module).items()):
        if value is stock:
            setattr(module, name, extended)
        elif isinstance(value, list) and stock in value:
            value[value.index(stock)] = extended
