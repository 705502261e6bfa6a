"""``llamafactory.webui.components.chatbot``: a heat map of the experts beside the conversation of ``webchat``."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from .patching import expect, is_patched, replace


def patch(module: ModuleType) -> None:
    """Add the heat map where the chat's model is loaded already and its routers are counted; else the stock page."""
    if is_patched(module):
        return
    stock = expect(module, "create_chat_box", ("engine", "visible"))

    @functools.wraps(stock)
    def create_chat_box(engine: Any, visible: bool = False) -> Any:
        model = getattr(getattr(engine.chatter, "engine", None), "model", None)
        if not any(wrapper.router_counts for wrapper in getattr(model, "_kt_wrappers", ())):
            return stock(engine, visible)
        import gradio

        with gradio.Row():
            with gradio.Column(scale=3):
                box = stock(engine, visible)
            with gradio.Column(scale=2):
                _add_heat_map(box[0], model)
        return box

    replace(module, create_chat_box=create_chat_box)


def _add_heat_map(chatbot: Any, model: Any) -> None:
    import gradio

    from ..lab.plots import router_heat_map
    from ..lab.router_stats import get_router_stats

    def draw() -> Any:
        model._kt_gate.wait_until_idle()
        stats = get_router_stats(model)
        first = next(iter(stats.values()))
        answers = first.tokens - first.prompt_tokens
        return router_heat_map(stats, f"{first.tokens} tokens, {answers} of them in answers")

    plot = gradio.Plot(value=draw(), label="Experts", show_label=False)
    # Every piece of an answer changes the conversation. One drawing waits for the end of the answer, and of those that
    # are asked for meanwhile the last one is done.
    chatbot.change(draw, outputs=plot, trigger_mode="always_last", show_progress="hidden")
