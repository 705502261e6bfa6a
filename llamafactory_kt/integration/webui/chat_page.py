"""The conversation of both pages: LLaMA-Factory's elements and ours, and what happens when they are used."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Iterator
from typing import Any

import gradio as gr

from ...model.state import has_kt_experts, kt_state
from .answers import Messages, Shown, answers_of, up_to_question
from .status import heat_map, status_line

ASKING = ("user", "observation")
"""the roles of messages that ask for an answer"""


def create(stock: Any, engine: Any, visible: bool) -> Any:
    """What ``create_chat_box`` returns, with our elements among the others.

    Args:
        stock: LLaMA-Factory's ``create_chat_box``.
        engine: of LLaMA-Factory's page.
        visible: whether a model is loaded.
    """
    chatter = engine.chatter

    def stream(request: gr.Request, *inputs: Any) -> Iterator[Shown]:
        if not has_kt_experts(getattr(chatter.engine, "model", None)):
            yield from chatter.stream(*inputs)
        elif inputs[1]:  # Clear history may have been pressed right after Submit
            yield from chatter.stream(*inputs, kt_page=request.session_hash)

    chatbot, messages, elements = stock(_Instead(engine, chatter=_Instead(chatter, stream=stream)), visible)
    ours = {f"kt_{name}": element for name, element in _create(elements["chat_box"], chatbot).items()}
    elements |= ours
    lang = engine.manager.get_elem_by_id("top.lang")

    known = elements | {"chatbot": chatbot, "messages": messages, "lang": lang}
    inputs = [known[name] for name in inspect.signature(chatter.stream).parameters]
    outputs = [chatbot, messages]
    ours["kt_again"].click(_ask_again, outputs, outputs, show_api=False).then(stream, inputs, outputs, show_api=False)

    def take_back(request: gr.Request, chatbot: Messages, messages: Messages) -> tuple[Messages, Messages, str]:
        asked = up_to_question(messages, *ASKING)
        kept = up_to_question(chatbot, "user")[:-1], asked[:-1]
        if (answer := answers_of(chatter).last(request.session_hash)) is not None:
            answer.conversation = kept  # for the page that is reloaded
        return *kept, asked[-1]["content"] if asked else ""

    ours["kt_edit"].click(take_back, outputs, [*outputs, elements["query"]], show_api=False)

    def stop(request: gr.Request) -> None:
        if (answer := answers_of(chatter).last(request.session_hash)) is not None:
            answer.stop()

    def clear(request: gr.Request) -> None:
        answers_of(chatter).clear(request.session_hash)

    ours["kt_stop"].click(stop, queue=False, show_api=False)
    elements["clear_btn"].click(clear, queue=False, show_api=False)
    chatbot.clear(clear, queue=False, show_api=False).then(
        list, outputs=[messages], show_api=False
    )  # its own little button

    browser = gr.BrowserState()
    _move_out(browser)

    def opened(known: str | None, language: str | None, request: gr.Request) -> Iterator[Any]:
        known = known or secrets.token_hex()
        answer = answers_of(chatter).opened(request.session_hash, known)
        yield known, gr.skip(), gr.skip()
        if answer is not None:
            for shown in answer.follow(language):
                yield gr.skip(), *shown

    # With None, gr.on runs when a page is opened, and whenever one of its inputs changes: the first has none.
    gr.on(None, lambda: None, inputs=[], show_api=False).then(
        opened, [browser, lang], [browser, *outputs], concurrency_limit=None, show_progress="hidden", show_api=False
    )
    follow(engine, elements, [chatbot.change, lang.change])

    def reset(language: str | None) -> Any:
        from ...router_stats.stats import reset_router_stats

        if heat_map(model := getattr(chatter.engine, "model", None), language):
            reset_router_stats(model)
        return heat_map(model, language)

    ours["kt_reset"].click(reset, [lang], [ours["kt_plot"]], show_api=False)
    return chatbot, messages, elements


def follow(engine: Any, elements: dict[str, Any], triggers: list[Any]) -> None:
    """Renew what is said about the model and the last answer: now, and when the answer that is running has ended."""
    chatter = engine.chatter

    def renew(language: str | None, request: gr.Request) -> Iterator[list[Any]]:
        answer = answers_of(chatter).last(request.session_hash)
        if answer is not None and answer.running:
            yield show(language, answer)
            answer.wait()
        yield show(language, answer)

    def show(language: str | None, answer: Any) -> list[Any]:
        model = getattr(chatter.engine, "model", None)
        loaded, running = has_kt_experts(model), answer is not None and answer.running
        asked = answer is not None and bool(answer.conversation[1]) and not running
        picture = "" if running else heat_map(model, language)
        return [
            gr.HTML(visible=loaded, value=status_line(model, answer, language)),
            gr.Row(visible=loaded),
            gr.Button(interactive=running),
            gr.Button(interactive=asked),
            gr.Button(interactive=asked),
            gr.Button(interactive=not running),
            gr.skip() if running else gr.Accordion(visible=bool(picture)),
            gr.skip() if running else picture,
            f"{id(model)} {kt_state(model).weights_key}" if loaded else "",
        ]

    names = (
        "kt_status",
        "kt_buttons",
        "kt_stop",
        "kt_again",
        "kt_edit",
        "submit_btn",
        "kt_heat_map",
        "kt_plot",
        "kt_loaded",
    )
    # Every piece of an answer changes the conversation. Of the calls that are requested during one, only the last runs.
    gr.on(
        triggers, renew, [engine.manager.get_elem_by_id("top.lang")], [elements[name] for name in names],
        trigger_mode="always_last", concurrency_limit=None, show_progress="hidden", show_api=False,
    )  # fmt: skip


class _Instead:
    """An object with some of its attributes replaced."""

    def __init__(self, stock: Any, **replaced: Any):
        self._stock = stock
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)


def _create(box: Any, chatbot: Any) -> dict[str, Any]:
    """Our elements: what is loaded above the conversation, the buttons below it, and the heat map at the end."""
    with box:
        status = gr.HTML(visible=False, elem_classes=["kt-steady", "kt-status"])
        with gr.Row(visible=False) as buttons:
            stop = gr.Button(size="sm", variant="stop", interactive=False)
            again = gr.Button(size="sm", interactive=False)
            edit = gr.Button(size="sm", interactive=False)
        with gr.Accordion(open=False, visible=False) as section:
            plot = gr.HTML(elem_classes="kt-steady")
            reset = gr.Button(size="sm")
        loaded = gr.State("")  # tells other parts of the page that another tab has changed what is loaded
    move(status, before=chatbot)
    move(buttons, after=chatbot)
    return {
        "status": status, "buttons": buttons, "stop": stop, "again": again, "edit": edit, "heat_map": section, "plot": plot,
        "reset": reset, "loaded": loaded,
    }  # fmt: skip


def move(element: Any, before: Any = None, after: Any = None) -> None:
    """Move an element of the page before or after a sibling."""
    siblings = element.parent.children
    siblings.remove(element)
    siblings.insert(siblings.index(before) if before else siblings.index(after) + 1, element)


def _move_out(element: Any) -> None:
    """Move an element to the end of the page. In a tab, it would not exist before the tab is opened."""
    element.parent.children.remove(element)
    while element.parent.parent is not None:
        element.parent = element.parent.parent
    element.parent.children.append(element)


def _ask_again(chatbot: Messages, messages: Messages) -> Shown:
    return up_to_question(chatbot, "user"), up_to_question(messages, *ASKING)
