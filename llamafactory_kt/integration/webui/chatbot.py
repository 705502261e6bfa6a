"""``llamafactory.webui.components.chatbot``: the conversation of both pages with Stop, Regenerate, and what is loaded.

Made for gradio 5: ``create_chat_box`` is checked by its parameters, the components are gradio's public ones. The limit of the page's events, one
at a time, is lifted in ``fns`` of the page that is being made.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ...model.state import has_kt_experts
from ..patching import expect, replace


def patch(module: ModuleType) -> None:
    """Add our parts. They are hidden unless a model with KT experts is loaded; ``webchat`` with another model is stock."""
    stock = expect(module, "create_chat_box")

    def create_chat_box(engine: Any, visible: bool = False) -> Any:
        ours = has_kt_experts(getattr(engine.chatter.engine, "model", None))
        if engine.pure_chat and not ours:
            return stock(engine, visible)
        from ..media import takes_media
        from .chat_page import create

        if ours:
            # webchat labels its elements only when the language changes, and with the initial "en" it would not change
            engine.manager.get_elem_by_id("top.lang").value = None
        chatbot, messages, elements = create(stock, engine, visible)
        if ours:
            elements["query"].lines = 1
            elements["mm_box"].visible = takes_media(engine.chatter.engine.template)
        return chatbot, messages, elements

    replace(module, create_chat_box)
