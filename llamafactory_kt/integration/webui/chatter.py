"""``llamafactory.webui.chatter``: the model behind the pages of ``webchat`` and LlamaBoard (``webui``).

Loads with ``use_kt`` run in a thread and show their progress, their errors appear in the page, and a Load that changes only the
adapter switches it. Figures follow each answer. Everything else is LLaMA-Factory's own.

Relies on its ``WebChatModel`` calling ``ChatModel.__init__`` with the arguments of a load, and on ``ChatModel``'s ``engine``,
``_loop`` and ``_thread``. Only the parameters of the hooked methods are checked.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

from ...ground.errors import KTError, describe
from ...ground.paging import give_back_memory
from ...model.state import has_kt_experts, kt_state
from ..listening import warn_if_open
from ..patching import asks_for, expect, replace
from .background_load import PageLoad, running_load, warn
from .loaded_form import LoadedForm
from .status import is_gone, model_path
from .texts import in_page_words, say


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
        with _loads(self):  # the page's events are not limited to one at a time
            if (running := running_load(self)) is None:
                reader = Reader(self)
                refused = list(stock_load(reader, data))
                if not hasattr(reader, "args"):
                    yield from refused
                    return
                args = with_section(self.manager, data, reader.args)
                switching = self.loaded and _adapter_alone_differs(self, args)
                if self.loaded and not switching and (asks_for("use_kt", args) or has_kt_experts(_model(self))):
                    if offer := _offer(self, args, data[self.manager.get_elem_by_id("top.lang")]):
                        yield warn(offer)
                        return
                    yield from self.unload_model(data)
                if not asks_for("use_kt", args):
                    yield from stock_load(self, data)
                    return

                if not switching:
                    warn_if_open()

                def work() -> None:
                    if switching:
                        _switch(self, args)
                    else:
                        base.__init__(self, args)
                    self._kt_args, self._kt_offered, self._kt_unloaded = args, None, False
                    self._kt_form = LoadedForm(self.manager, data, args)

                running = self._kt_load = PageLoad(work, switching, debug=asks_for("kt_debug", args))
        yield from running.report(data[self.manager.get_elem_by_id("top.lang")])

    def unload_model(self: Any, data: dict[Any, Any]) -> Iterator[str]:
        if (load := running_load(self)) is not None:
            language = data[self.manager.get_elem_by_id("top.lang")]
            load.stop()
            yield say("stopping_load", language)
            load.wait()
            if not self.loaded:
                yield say("load_stopped", language)
                return
        ours = has_kt_experts(_model(self))
        if ours:
            from .answers import answers_of

            answers_of(self).end()
            kt_state(_model(self)).lock.wait_until_idle()
        yield from stock_unload(self, data)
        if ours and not self.loaded:
            self._kt_args, self._kt_form, self._kt_unloaded = None, None, True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            give_back_memory()

    def stream(
        self: Any, chatbot: Any, messages: Any, lang: Any, *rest: Any, kt_page: str | None = None, **more: Any
    ) -> Iterator[tuple[Any, Any]]:
        import gradio

        if not has_kt_experts(_model(self)):
            if is_gone(self):
                yield chatbot, messages
                raise gradio.Error(say("gone", lang), duration=None, print_exception=False)
            yield from stock_stream(self, chatbot, messages, lang, *rest, **more)
            return
        from .answers import answered, answers_of

        def start(generation: Any) -> Iterator[tuple[Any, Any]]:
            asking = _Asking(self, generation)
            return stock_stream(asking, [*chatbot], answered(messages), lang, *rest, **more)  # type: ignore[no-any-return]

        try:
            yield from answers_of(self).ask(kt_page, start, (chatbot, messages)).follow(lang)
        except Exception as error:
            text = html.escape(in_page_words(describe(error, lines=True), lang)).replace("\n", "<br>")
            unknown = not isinstance(error, KTError)
            raise gradio.Error(text, duration=None, print_exception=unknown) from error

    replace(chatter, load_model, unload_model, stream)


def with_section(manager: Any, data: dict[Any, Any], args: dict[str, Any]) -> dict[str, Any]:
    """The page's arguments and those of its KTransformers section; the extra arguments, already in ``args``, win."""
    from .infer import section_values

    values = section_values(manager, data)
    nested = args.get("kt_config")
    return {k: v for k, v in values.items() if not (isinstance(nested, dict) and k in nested)} | args


def _switch(chatter: Any, args: dict[str, Any]) -> None:
    from ...apply import switch_adapter
    from ...router_stats.stats import counts_experts, reset_router_stats
    from ..chat_config import open_configured, parse
    from ..model.loader import log_load_table
    from .answers import answers_of

    model, model_args = _model(chatter), parse(args)
    switch_adapter(model, open_configured(model_args), model_args.kt_lora_scope)
    if counts_experts(model):
        reset_router_stats(model)
        answers_of(chatter).count_anew()
    log_load_table(model)


class _Asking:
    """The chatter for one answer: passes the Generation along with the question, and keeps its engine after Unload."""

    def __init__(self, chatter: Any, generation: Any):
        self._chatter, self._generation, self.engine = chatter, generation, chatter.engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chatter, name)

    def stream_chat(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        texts: Iterator[str] = self._chatter.stream_chat(*args, kt_generation=self._generation, **kwargs)
        return texts


def _model(chatter: Any) -> Any:
    return getattr(chatter.engine, "model", None)


def _loads(chatter: Any) -> Lock:
    """Held until a load has begun, or a plain one has ended."""
    lock: Lock = vars(chatter).setdefault("_kt_loads", Lock())
    return lock


def _adapter_alone_differs(chatter: Any, args: dict[str, Any]) -> bool:
    before = getattr(chatter, "_kt_args", None)
    if before is None or not has_kt_experts(_model(chatter)):
        return False
    return {key for key in args.keys() | before.keys() if args.get(key) != before.get(key)} == {"adapter_name_or_path"}


def _offer(chatter: Any, args: dict[str, Any], language: str) -> str | None:
    """What to do about the model that is loaded; None if the page has said so, and Load was pressed again."""
    from llamafactory.webui.locales import LOCALES

    before = getattr(chatter, "_kt_args", None) or {}
    changed = sorted(key for key in args.keys() | before.keys() if args.get(key) != before.get(key))
    if not changed:
        return say("loaded_so", language)
    offered, chatter._kt_offered = getattr(chatter, "_kt_offered", None), args
    if offered == args:
        return None
    loaded, wanted = (Path(str(path)).name for path in (model_path(_model(chatter)), args["model_name_or_path"]))
    keys = say("changed", language, keys=", ".join(changed)) if before else ""
    return say(
        "offer", language, loaded=loaded, changed=keys, wanted=wanted, button=LOCALES["load_btn"][language]["value"]
    )
