"""``llamafactory.webui.chatter``: the model behind the pages of ``webchat`` and LlamaBoard (``webui``).

Loads with ``use_kt`` run in a thread and show their progress, their errors appear in the page, and a Load that changes only the
adapter switches it. Figures follow each answer. Everything else is LLaMA-Factory's own.

Relies on its ``WebChatModel`` calling ``ChatModel.__init__`` with the arguments of a load, and on ``ChatModel``'s ``engine``,
``_loop`` and ``_thread``. Only the parameters of the hooked methods are checked.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import ModuleType
from typing import Any

from ...ground.errors import KTError
from ...ground.paging import give_back_memory
from ...model.state import has_kt_experts, kt_state
from ..listening import warn_if_open
from ..patching import asks_for, expect, replace
from .background_load import PageLoad, warn
from .texts import say


def patch(module: ModuleType) -> None:
    """Hook the chatter's three methods; all or none."""
    chatter: Any = module.WebChatModel
    base: Any = module.ChatModel
    stock_load = expect(chatter, "load_model")
    stock_unload = expect(chatter, "unload_model")
    stock_stream = expect(chatter, "stream")

    class Recorder(base):  # type: ignore[misc]
        """Stands in for ``ChatModel``: records what it should load."""

        def __init__(self, args: dict[str, Any]):
            self.args = args

    class Reader(chatter, Recorder):  # type: ignore[misc, valid-type]
        """Lets the stock method check the page and collect its arguments, and loads nothing."""

        def __init__(self, page: Any):
            self.manager, self.demo_mode, self.engine = page.manager, page.demo_mode, None

    def load_model(self: Any, data: dict[Any, Any]) -> Iterator[str]:
        if (running := _running(self)) is None:
            reader = Reader(self)
            refused = list(stock_load(reader, data))
            if not hasattr(reader, "args"):
                yield from refused
                return
            args = with_section(self.manager, data, reader.args)
            switching = self.loaded and _adapter_alone_differs(self, args)
            if not asks_for("use_kt", args) or (self.loaded and not switching):
                yield from stock_load(self, data)  # which refuses if a model is loaded
                return

            if not switching:
                warn_if_open()

            def work() -> None:
                if switching:
                    _switch(self.engine.model, args)
                else:
                    base.__init__(self, args)
                self._kt_args = args

            running = self._kt_load = PageLoad(work, switching, debug=asks_for("kt_debug", args))
        yield from running.report(data[self.manager.get_elem_by_id("top.lang")])

    def unload_model(self: Any, data: dict[Any, Any]) -> Iterator[str]:
        if _running(self) is not None:
            yield warn(say("busy", data[self.manager.get_elem_by_id("top.lang")]))
            return
        ours = has_kt_experts(_model(self))
        if ours:
            for generation in tuple(_answers(self)):
                generation.stop()
            kt_state(_model(self)).lock.wait_until_idle()
        yield from stock_unload(self, data)
        if ours and not self.loaded:
            self._kt_args = None
            if not _answers(self):  # otherwise a thread that reads an answer would wait forever
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()
            give_back_memory()

    def stream(self: Any, chatbot: Any, messages: Any, lang: Any, *rest: Any, **more: Any) -> Iterator[tuple[Any, Any]]:
        if not has_kt_experts(_model(self)):
            yield from stock_stream(self, chatbot, messages, lang, *rest, **more)
            return
        import gradio

        from ..generation import Generation

        generation = Generation()
        _answers(self).add(generation)
        try:
            for shown in stock_stream(_Asking(self, generation), chatbot, messages, lang, *rest, **more):
                chatbot, messages = shown
                if not generation.tokens and generation.read_tokens < generation.prompt_tokens:
                    text = say("reading", lang, read=generation.read_tokens, prompt=generation.prompt_tokens)
                    yield [*chatbot[:-1], {"role": "assistant", "content": f"<small>{text}</small>"}], messages
                else:
                    yield shown
        except KTError as error:
            raise gradio.Error(html.escape(str(error)), duration=None) from error
        finally:
            generation.stop()
            _answers(self).discard(generation)
        if generation.tokens:  # a message of its own: the answer may end inside a code block
            kept = say("kept", lang, cached=generation.cached_tokens) if generation.cached_tokens else ""
            figures = say(
                "figures", lang, speed=generation.tokens_per_second, prompt=generation.prompt_tokens, kept=kept,
                first=generation.seconds_to_first_token, answer=generation.tokens,
            )  # fmt: skip
            yield [*chatbot, {"role": "assistant", "content": f"<small>{figures}</small>"}], messages

    replace(chatter, load_model, unload_model, stream)


def with_section(manager: Any, data: dict[Any, Any], args: dict[str, Any]) -> dict[str, Any]:
    """The page's arguments and those of its KTransformers section; the extra arguments, already in ``args``, win."""
    from .infer import section_values

    values = section_values(manager, data)
    nested = args.get("kt_config")
    return {k: v for k, v in values.items() if not (isinstance(nested, dict) and k in nested)} | args


def _switch(model: Any, args: dict[str, Any]) -> None:
    from ...apply import switch_adapter
    from ..chat_config import open_configured, parse
    from ..model.loader import log_load_table

    model_args = parse(args)
    switch_adapter(model, open_configured(model_args), model_args.kt_lora_scope)
    log_load_table(model)


class _Asking:
    """The chatter for one answer: passes the Generation along with the question, and keeps its engine after Unload. While no text comes,
    the page gets none now and then, and can show something else."""

    def __init__(self, chatter: Any, generation: Any):
        self._chatter, self._generation, self.engine = chatter, generation, chatter.engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chatter, name)

    def stream_chat(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        texts: Iterator[str] = self._chatter.stream_chat(*args, kt_generation=self._generation, **kwargs)
        with ThreadPoolExecutor(1) as reader:
            try:
                while True:
                    coming = reader.submit(next, texts, None)
                    while not wait([coming], _TICK).done:
                        yield ""
                    if (text := coming.result()) is None:
                        return
                    yield text
            finally:
                self._generation.stop()


_TICK = 0.5
"""seconds"""


def _model(chatter: Any) -> Any:
    return getattr(chatter.engine, "model", None)


def _running(chatter: Any) -> PageLoad | None:
    """The load that another page, or this one before a reload, has started."""
    load: PageLoad | None = getattr(chatter, "_kt_load", None)
    return load if load is not None and load.running else None


def _answers(chatter: Any) -> set[Any]:
    """The Generations of the answers that are being read."""
    answers: set[Any] = vars(chatter).setdefault("_kt_answers", set())
    return answers


def _adapter_alone_differs(chatter: Any, args: dict[str, Any]) -> bool:
    before = getattr(chatter, "_kt_args", None)
    if before is None or not has_kt_experts(_model(chatter)):
        return False
    return {key for key in args.keys() | before.keys() if args.get(key) != before.get(key)} == {"adapter_name_or_path"}
