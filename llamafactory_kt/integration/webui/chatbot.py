"""``llamafactory.webui.components.chatbot``: a heat map of the experts beside the conversation, on both pages.

Made for gradio 5: ``create_chat_box`` is checked by its parameters, the components are gradio's public ones.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ...model.state import has_kt_experts, kt_state
from ..patching import expect, replace


def patch(module: ModuleType) -> None:
    """Add the heat map. It is hidden unless a model with router statistics is loaded."""
    stock = expect(module, "create_chat_box")

    def create_chat_box(engine: Any, visible: bool = False) -> Any:
        import gradio

        if has_kt_experts(getattr(engine.chatter.engine, "model", None)):
            # webchat labels its elements only when the language changes, and with the initial "en" it would not change
            engine.manager.get_elem_by_id("top.lang").value = None
        with gradio.Row():
            with gradio.Column(scale=3):
                chatbot, messages, elements = stock(engine, visible)
            with gradio.Column(scale=2, visible=False) as heat_map:
                plot = gradio.Plot(show_label=False)

        def draw() -> list[Any]:
            return draw_experts(engine)

        # Every piece of an answer changes the conversation. The first drawing waits for the end of the answer; of those that
        # are requested meanwhile, only the last runs.
        for triggers in (None, chatbot.change):  # None: when a page is opened
            gradio.on(
                triggers, draw, inputs=[], outputs=[heat_map, plot],
                trigger_mode="always_last", show_progress="hidden", show_api=False,
            )  # fmt: skip
        return chatbot, messages, elements | {"kt_heat_map": heat_map, "kt_plot": plot}

    replace(module, create_chat_box)


def draw_experts(engine: Any) -> list[Any]:
    """New values of the heat map's column and its plot. Waits for a running answer."""
    import gradio

    model: Any = getattr(engine.chatter.engine, "model", None)
    if not has_kt_experts(model) or not any(wrapper.router_counts for wrapper in kt_state(model).wrappers):
        return [gradio.Column(visible=False), None]
    from ...router_stats.plots import router_heat_map
    from ...router_stats.stats import get_router_stats

    kt_state(model).lock.wait_until_idle()
    stats = get_router_stats(model)
    first = next(iter(stats.values()))
    answers = first.tokens - first.prompt_tokens
    figure = router_heat_map(stats, f"{first.tokens} tokens, {answers} of them in answers")
    return [gradio.Column(visible=True), figure]
