"""``llamafactory.v1``: no hook reaches the rewrite behind ``USE_V1=1``, so ``use_kt`` is refused there."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ..ground.errors import KTHookError
from .excepthook import end_in_one_paragraph
from .patching import asks_for, expect, replace, versions


def patch(module: ModuleType) -> None:
    """Let ``use_kt: true`` fail with the reason; everything else passes through."""
    stock = expect(module, "get_args")

    def get_args(args: Any = None) -> Any:
        if asks_for("use_kt", args):
            if args is None:
                end_in_one_paragraph()
            raise KTHookError(
                "use_kt: true does not work with USE_V1=1: found llamafactory.v1.config.arg_parser.get_args, expected "
                f"llamafactory.hparams.parser.get_infer_args. Unset USE_V1. Installed: {versions()}."
            )
        return stock(args)

    replace(module, get_args)
