"""``llamafactory.webui.chatter``: the model behind the pages of ``webchat`` and LlamaBoard (``webui``).

Loads with ``use_kt`` run in a thread and tell how far they are, their errors are shown in the page, and a Load that
changes nothing but the adapter exchanges it. Under each answer stand its figures. All else is LLaMA-Factory's own.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ...ground.errors import KTError
from ...ground.machine import gib
from ...ground.paging import give_back_memory
from ...model.state import has_kt_experts, kt_state
from ..patching import asks_for, expect, is_patched, replace
from .background_load import PageLoad
from .texts import say

_STREAM = (
    "self", "chatbot", "messages", "lang", "system", "tools", "image", "video", "audio", "max_new_tokens", "top_p",
    "temperature", "skip_special_tokens", "escape_html", "enable_thinking",
)  # fmt: skip


def patch(module: ModuleType) -> None:
    """Hook the chatter's three methods; all or none."""
    if is_patched(module):
        return
    chatter: Any = module.WebChatModel
    base: Any = module.ChatModel
    load_stock = expect(chatter, "load_model", ("self", "data"))
    unload_stock = expect(chatter, "unload_model", ("self", "data"))
    stream_stock = expect(chatter, "stream", _STREAM)

    class Reader(chatter, _recorder(base)):  # type: ignore[misc, valid-type]
        """Lets the stock method check the page and collect its arguments, and loads nothing."""

        def __init__(self, page: Any):
            self.manager, self.demo_mode, self.engine = page.manager, page.demo_mode, None

    @functools.wraps(load_stock)
    def load_model(self: Any, data: dict[Any, Any]) -> Iterator[str]:
        if (running := _running(self)) is None:
            reader = Reader(self)
            refused = list(load_stock(reader, data))
            if not hasattr(reader, "args"):
                yield from refused
                return
            args = with_section(self.manager, data, reader.args)
            if not asks_for("use_kt", args):
                yield from load_stock(self, data)
                return
            if self.loaded:
                if not _adapter_alone_differs(self, args):
                    yield from load_stock(self, data)  # which says that there is a model already
                    return
                running = Switch(self, args)
            else:
                running = Load(self, args, functools.partial(base.__init__, self, args))
            self._kt_load = running
        yield from running.tell(data[self.manager.get_elem_by_id("top.lang")])

    @functools.wraps(unload_stock)
    def unload_model(self: Any, data: dict[Any, Any]) -> Iterator[str]:
        if _running(self) is not None:
            yield _warn(say("busy", data[self.manager.get_elem_by_id("top.lang")]))
            return
        ours = has_kt_experts(_model(self))
        if ours:
            for generation in tuple(_answers(self)):
                generation.stop()
            kt_state(_model(self)).lock.wait_until_idle()
        yield from unload_stock(self, data)
        if ours and not self.loaded:
            self._kt_args = None
            if not _answers(self):  # else the thread that reads the answer would wait for ever
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()
            give_back_memory()

    @functools.wraps(stream_stock)
    def stream(self: Any, chatbot: Any, messages: Any, lang: Any, *rest: Any, **more: Any) -> Iterator[tuple[Any, Any]]:
        if not has_kt_experts(_model(self)):
            yield from stream_stock(self, chatbot, messages, lang, *rest, **more)
            return
        import gradio

        from ..generation import Generation

        generation = Generation()
        _answers(self).add(generation)
        try:
            for shown in stream_stock(_Asking(self, generation), chatbot, messages, lang, *rest, **more):
                chatbot, messages = shown
                yield shown
        except KTError as error:
            raise gradio.Error(html.escape(str(error)), duration=None) from error
        finally:
            generation.stop()
            _answers(self).discard(generation)
        if generation.tokens:  # a message of its own: the answer may end within a block of code
            figures = f"<small>{describe_answer(generation, lang)}</small>"
            yield [*chatbot, {"role": "assistant", "content": figures}], messages

    replace(chatter, load_model=load_model, unload_model=unload_model, stream=stream)
    replace(module)  # marks it


def describe_answer(generation: Any, language: str | None) -> str:
    """An answer's figures in one line."""
    return say(
        "figures", language, speed=generation.tokens_per_second, prompt=generation.prompt_tokens,
        first=generation.seconds_to_first_token, answer=generation.tokens,
    )  # fmt: skip


def with_section(manager: Any, data: dict[Any, Any], args: dict[str, Any]) -> dict[str, Any]:
    """The page's arguments with those of its section for KTransformers; the extra arguments, in ``args`` already, win."""
    from .infer import section_values

    values = section_values(manager, data)
    nested = args.get("kt_config")
    return {k: v for k, v in values.items() if not (isinstance(nested, dict) and k in nested)} | args


class Load(PageLoad):
    """A model is being loaded."""

    def __init__(self, chatter: Any, args: dict[str, Any], load: Callable[[], None]):
        def work() -> None:
            load()
            chatter._kt_args = args

        super().__init__(work, debug=asks_for("kt_debug", args))

    def tell(self, language: str) -> Iterator[str]:
        """What to show while it runs, and how it ended."""
        from llamafactory.webui.locales import ALERTS

        def describe(load: PageLoad) -> str:
            if (at := load.progress) is None or at.read == at.total:
                return say("waiting", language, before=ALERTS["info_loading"][language], seconds=load.seconds)
            return say(
                "experts", language, layer=at.layer, layers=at.layers, read=gib(at.read), total=gib(at.total),
                speed=gib(at.bytes_per_second), seconds=load.seconds,
            )  # fmt: skip

        yield ALERTS["info_loading"][language]
        yield from self.follow(describe)
        yield _warn(say("failed", language, error=self.error)) if self.error else ALERTS["info_loaded"][language]


class Switch(PageLoad):
    """The adapter of the loaded model is being exchanged."""

    def __init__(self, chatter: Any, args: dict[str, Any]):
        def work() -> None:
            from ...apply import switch_adapter
            from ..chat_config import open_configured, parse
            from ..model_loader import log_load_table

            model, model_args = chatter.engine.model, parse(args)
            adapters = open_configured(model_args)
            switch_adapter(model, adapters, model_args.kt_lora_scope)
            log_load_table(model)
            chatter._kt_args = args

        super().__init__(work, debug=asks_for("kt_debug", args))

    def tell(self, language: str) -> Iterator[str]:
        """As :meth:`Load.tell`."""
        before = say("switching", language)
        yield before
        yield from self.follow(lambda load: say("waiting", language, before=before, seconds=load.seconds))
        yield _warn(say("not_switched", language, error=self.error)) if self.error else say("switched", language)


def _recorder(base: Any) -> Any:
    class Recorder(base):  # type: ignore[misc]
        """Stands before ``ChatModel``, whose ``__init__`` the stock method calls with what is to be loaded."""

        def __init__(self, args: dict[str, Any]):
            self.args = args

    return Recorder


class _Asking:
    """The chatter for one answer, whose Generation goes along with the question; Unload does not take its engine away."""

    def __init__(self, chatter: Any, generation: Any):
        self._chatter, self._generation, self.engine = chatter, generation, chatter.engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chatter, name)

    def stream_chat(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        texts: Iterator[str] = self._chatter.stream_chat(*args, kt_generation=self._generation, **kwargs)
        return texts


def _model(chatter: Any) -> Any:
    return getattr(chatter.engine, "model", None)


def _running(chatter: Any) -> Load | Switch | None:
    """The load that another page (or this one, before it was reloaded) has begun."""
    load: Load | Switch | None = getattr(chatter, "_kt_load", None)
    return load if load is not None and load.running else None


def _answers(chatter: Any) -> set[Any]:
    """The Generations of the answers that are being read."""
    answers: set[Any] = vars(chatter).setdefault("_kt_answers", set())
    return answers


def _adapter_alone_differs(chatter: Any, args: dict[str, Any]) -> bool:
    before = getattr(chatter, "_kt_args", None)
    if before is None or not has_kt_experts(_model(chatter)):
        return False
    key = "adapter_name_or_path"
    same = {k: v for k, v in args.items() if k != key} == {k: v for k, v in before.items() if k != key}
    return same and args.get(key) != before.get(key)


def _warn(text: str) -> str:
    """Show it as LLaMA-Factory's pages show warnings, and return it for the page itself."""
    import gradio

    gradio.Warning(html.escape(text))
    return text
