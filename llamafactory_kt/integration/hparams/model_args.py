"""``llamafactory.hparams.model_args``: ModelArguments gets the kt_* fields."""

from __future__ import annotations

import dataclasses
import functools
import sys
from types import ModuleType
from typing import Any

from ...ground.errors import KTHookError
from ...settings.keys import KTArguments
from ..known_versions import ADVICE
from ..patching import check_stock, expect, versions


def patch(module: ModuleType) -> None:
    """Replace ModelArguments by a subclass of the same name, before the parser puts it into its lists.

    Raises:
        KTHookError: A fork is installed, or the class is not the expected one.
    """
    check_stock()
    stock: Any = getattr(module, "ModelArguments", None)
    if not hasattr(stock, "__dataclass_fields__") or "use_kt" not in {f.name for f in dataclasses.fields(stock)}:
        raise KTHookError(
            f"{module.__name__}.ModelArguments cannot be hooked: found {stock!r}, expected a dataclass with the field "
            f"use_kt. {ADVICE}. Installed: {versions()}."
        )
    namespace = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    if (loading := expect(stock, "configure_kt_loading")) is not None:
        namespace["configure_kt_loading"] = _for_others(loading)
    extended: Any = dataclasses.dataclass(type("ModelArguments", (KTArguments, stock), namespace))
    importers = (sys.modules.get(name) for name in ("llamafactory.hparams", "llamafactory.hparams.parser"))
    for holder in (module, *filter(None, importers)):
        for name, value in list(vars(holder).items()):
            if value is stock:
                setattr(holder, name, extended)
            elif isinstance(value, list) and stock in value:
                value[value.index(stock)] = extended


def _for_others(stock: Any) -> Any:
    """The method for models that are not ours: it prepares an inference through KTransformers' forks."""

    @functools.wraps(stock)
    def configure_kt_loading(self: Any, *args: Any, **kwargs: Any) -> None:
        if not getattr(self, "kt_inference", False):
            stock(self, *args, **kwargs)

    return configure_kt_loading
