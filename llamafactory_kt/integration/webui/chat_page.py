"""The conversation of both pages: LLaMA-Factory's elements and ours, and what happens when they are used."""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Iterator
from threading import Lock
from typing import Any

import gradio as gr

from ...model.state import has_kt_experts, kt_state
from ...router_stats.svg import POINTER
from .answers import answers_of, up_to_question
from .making import Instead, move, move_out, unlimited
from .page_answer import Messages, Shown
from .status import heat_map, is_gone, status_line
from .texts import say

ASKING = ("user", "observation")
"""the roles of messages that ask for an answer"""
FOCUS = "() => { if (document.querySelector('.kt-status b')) document.querySelector('.kt-query textarea')?.focus() }"
"""JavaScript: the next thing to do is to type, if a model of ours is loaded"""
LATEST = """() => {
    const log = document.querySelector('.kt-status b') && document.querySelector('.kt-chat .bubble-wrap')
    log?.scrollTo(0, log.scrollHeight)
}"""
"""JavaScript: to the end of the conversation, which gradio then follows, also if somebody who asks has read further up"""


def create(stock: Any, engine: Any, visible: bool) -> Any:
    """What ``create_chat_box`` returns, with our elements among the others.

    Args:
        stock: LLaMA-Factory's ``create_chat_box``.
        engine: of LLaMA-Factory's page.
        visible: whether a model is loaded.
    """
    chatter, plain = engine.chatter, Lock()
    answers = answers_of(chatter)

    def append(request: gr.Request, *inputs: Any) -> Any:
        last, query = answers.last(request.session_hash), dict(zip(asked_with, inputs, strict=True))["query"]
        busy = last is not None and last.running
        if is_gone(chatter) or (_ours(chatter) and (busy or not query.strip())):
            return [gr.skip()] * 3  # what was typed stays in its field
        return chatter.append(*inputs)

    def stream(request: gr.Request, *inputs: Any) -> Iterator[Shown]:
        if not _ours(chatter):
            with plain:  # one after the other, which gradio sees to for LLaMA-Factory
                yield from chatter.stream(*inputs)
            return
        last = answers.last(request.session_hash)
        if last is None or last.taken_back or inputs[1] != last.asked:
            yield from answer(request, *inputs)
        else:
            yield gr.skip(), gr.skip()

    def answer(request: gr.Request, *inputs: Any) -> Iterator[Shown]:
        if inputs[1] and inputs[1][-1]["role"] in ASKING:  # Clear history may have been pressed right after Submit
            yield from chatter.stream(*inputs, kt_page=request.session_hash)
        else:
            yield gr.skip(), gr.skip()  # gradio empties what gets nothing

    asked_with = list(inspect.signature(chatter.append).parameters)
    chatbot, messages, elements = stock(
        Instead(engine, chatter=Instead(chatter, append=append, stream=stream)), visible
    )
    unlimited(stream)  # otherwise a second tab waits without a word, and cannot be stopped
    ours = {f"kt_{name}": element for name, element in _create(elements["chat_box"], chatbot).items()}
    elements |= ours
    lang = engine.manager.get_elem_by_id("top.lang")

    query = elements["query"]
    query.elem_classes = [*query.elem_classes, "kt-query"]
    elements["submit_btn"].elem_classes = [*elements["submit_btn"].elem_classes, "kt-submit"]
    chatbot.elem_classes = [*chatbot.elem_classes, "kt-chat"]
    known = elements | {"chatbot": chatbot, "messages": messages, "lang": lang}
    inputs = [known[name] for name in inspect.signature(chatter.stream).parameters]
    outputs = [chatbot, messages]

    def entered(request: gr.Request, *inputs: Any) -> Any:
        return append(request, *inputs) if _ours(chatter) or is_gone(chatter) else [gr.skip()] * 3

    def answer_entered(request: gr.Request, *inputs: Any) -> Iterator[Shown]:
        if _ours(chatter) or is_gone(chatter):
            yield from stream(request, *inputs)
        else:
            yield gr.skip(), gr.skip()

    query.submit(entered, [known[name] for name in asked_with], [*outputs, query], show_api=False).then(
        answer_entered, inputs, outputs, concurrency_limit=None, show_api=False
    )
    ours["kt_again"].click(_ask_again, outputs, outputs, show_api=False).then(
        answer, inputs, outputs, concurrency_limit=None, show_api=False
    )

    def take_back(request: gr.Request, chatbot: Messages, messages: Messages) -> tuple[Messages, Messages, str]:
        asked = up_to_question(messages, *ASKING)
        kept = up_to_question(chatbot, "user")[:-1], asked[:-1]
        if (answer := answers.last(request.session_hash)) is not None:
            answer.take_back(kept)
        return *kept, _as_typed(asked[-1]["content"]) if asked else ""

    ours["kt_edit"].click(take_back, outputs, [*outputs, query], show_api=False).then(None, js=FOCUS, show_api=False)

    def stop(request: gr.Request) -> None:
        if (answer := answers.last(request.session_hash)) is not None:
            answer.stop()

    def clear(request: gr.Request, times: int) -> int:
        answers.clear(request.session_hash)
        return times + 1

    cleared = ours["kt_cleared"]
    ours["kt_stop"].click(stop, queue=False, show_api=False)
    elements["clear_btn"].click(clear, cleared, cleared, queue=False, show_api=False)
    chatbot.clear(clear, cleared, cleared, queue=False, show_api=False).then(
        list, outputs=[messages], show_api=False
    )  # its own little button
    for button in (elements["submit_btn"], elements["clear_btn"], ours["kt_stop"], ours["kt_again"]):
        button.click(None, js=FOCUS, show_api=False)
    gr.on([elements["submit_btn"].click, query.submit, ours["kt_again"].click], None, js=LATEST, show_api=False)

    browser = gr.BrowserState()
    move_out(browser)

    def opened(known: str | None, language: str | None, request: gr.Request) -> Iterator[Any]:
        known = known or secrets.token_hex()
        answer = answers.opened(request.session_hash, known)
        yield known, gr.skip(), gr.skip()
        if answer is not None:
            for shown in answer.follow(language):
                yield gr.skip(), *shown

    # With None, gr.on runs when a page is opened, and whenever one of its inputs changes: the first has none.
    gr.on(None, lambda: None, inputs=[], show_api=False).then(
        opened, [browser, lang], [browser, *outputs], concurrency_limit=None, show_progress="hidden", show_api=False
    )
    gr.on(None, None, js=POINTER, show_api=False)
    # asking changes no conversation if the model is gone
    asking = [elements["submit_btn"].click, query.submit]
    follow(engine, elements, [chatbot.change, lang.change, cleared.change, *asking])

    def reset(language: str | None) -> Any:
        from ...router_stats.stats import counts_experts, reset_router_stats

        if _ours(chatter) and counts_experts(model := _model(chatter)):
            reset_router_stats(model)
            answers.count_anew()
        return heat_map(_model(chatter), None, language)

    ours["kt_reset"].click(reset, [lang], [ours["kt_plot"]], show_api=False)
    return chatbot, messages, elements


def follow(engine: Any, elements: dict[str, Any], triggers: list[Any]) -> None:
    """Renew what is said about the model and the last answer: now, when its turn comes, and when it has ended."""
    chatter = engine.chatter

    def renew(language: str | None, request: gr.Request) -> Iterator[list[Any]]:
        answer = answers_of(chatter).last(request.session_hash)
        if answer is not None and answer.running:
            if answer.ahead:
                yield show(language, answer)
                answer.wait_for_turn()
            yield show(language, answer)
            answer.wait()
        yield show(language, answer)

    def show(language: str | None, answer: Any) -> list[Any]:
        model, loaded = _model(chatter), _ours(chatter)
        running = answer is not None and answer.running
        asked = answer is not None and bool(answer.conversation[1]) and not running
        picture = heat_map(model, answer, language)
        return [
            gr.HTML(visible=loaded, value=status_line(model, answer, language)),
            gr.Row(visible=loaded),
            gr.Button(interactive=running),
            gr.Button(interactive=asked),
            gr.Button(interactive=asked),
            gr.Button(interactive=not running),
            question_field(elements["query"], loaded, language),
            gr.Accordion(visible=bool(picture)),
            picture,
            f"{id(model)} {kt_state(model).weights_key}" if loaded else "",
        ]

    names = (
        "kt_status",
        "kt_buttons",
        "kt_stop",
        "kt_again",
        "kt_edit",
        "submit_btn",
        "query",
        "kt_heat_map",
        "kt_plot",
        "kt_loaded",
    )
    # Every piece of an answer changes the conversation. Of the calls that are requested during one, only the last runs.
    gr.on(
        triggers, renew, [engine.manager.get_elem_by_id("top.lang")], [elements[name] for name in names],
        trigger_mode="always_last", concurrency_limit=None, show_progress="hidden", show_api=False,
    )  # fmt: skip


def question_field(stock: Any, loaded: bool, language: str | None) -> Any:
    """What the input field becomes: with one line, gradio sends it on Enter. As LLaMA-Factory has it, unless a model of ours is loaded.

    Args:
        stock: the field as it was made.
    """
    from llamafactory.webui.locales import LOCALES

    if loaded:
        return gr.Textbox(lines=1, placeholder=say("placeholder", language))
    return gr.Textbox(lines=stock.lines, **LOCALES["query"].get(language, {}))


def _model(chatter: Any) -> Any:
    return getattr(chatter.engine, "model", None)


def _ours(chatter: Any) -> bool:
    return has_kt_experts(_model(chatter))


def _as_typed(question: str) -> str:
    """Without what LLaMA-Factory has put before it for a picture, a video or a sound.

    >>> _as_typed("<image><image>What are they?"), _as_typed("a <image>")
    ('What are they?', 'a <image>')
    """
    return re.sub(r"^(<(image|video|audio)>)+", "", question)


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
        cleared = gr.State(0)  # how often the conversation was cleared
    move(status, before=chatbot)
    move(buttons, after=chatbot)
    return {
        "status": status, "buttons": buttons, "stop": stop, "again": again, "edit": edit, "heat_map": section, "plot": plot,
        "reset": reset, "loaded": loaded, "cleared": cleared,
    }  # fmt: skip


def _ask_again(chatbot: Messages, messages: Messages) -> Shown:
    return up_to_question(chatbot, "user"), up_to_question(messages, *ASKING)
