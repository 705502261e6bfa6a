"""``llamafactory.chat.chat_model``: ``/experts`` in the terminal chat prints the router statistics."""

from __future__ import annotations

import builtins
from types import ModuleType
from typing import Any

from ..errors import KTHookError, KTModelError
from . import loader
from .patching import expect, is_patched, replace, versions

COMMAND = "/experts"


def patch(module: ModuleType) -> None:
    """Give the module an ``input`` of its own, which run_chat looks up when it asks for a line.

    Without KT experts it is the stock one: whatever is typed goes to the model.
    """
    if is_patched(module):
        return
    run_chat: Any = expect(module, "run_chat", ())
    if "input" not in run_chat.__code__.co_names:
        raise KTHookError(
            f"{module.__name__}.run_chat cannot be hooked: it does not call input(). Installed: {versions()}."
        )

    def read_line(prompt: object = "") -> str:
        while True:
            line = builtins.input(prompt)
            model = loader.latest_model()
            if line.strip() != COMMAND or model is None:
                return line
            print(experts_text(model))

    replace(module, input=read_line)


def experts_text(model: Any) -> str:
    """The table of router statistics, or why there is none."""
    from ..lab.router_stats import get_router_stats, router_table

    try:
        return router_table(get_router_stats(model))
    except KTModelError as error:
        return str(error)
