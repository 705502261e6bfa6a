"""``llamafactory.chat.hf_engine``: answers of a model with KT experts can be stopped and end at stop strings, pictures are where the
model expects them, and an error in ``generate`` reaches the caller. Stock LLaMA-Factory keeps generating for clients that are gone, ignores ``stop``, and
waits forever for a thread that has raised. Other models are left alone.

Uses ``text_queue`` and ``stop_signal`` of transformers 5.6's ``TextIteratorStreamer``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import AsyncIterator, Callable
from itertools import takewhile
from threading import Thread
from types import ModuleType
from typing import Any

from ..model.state import has_kt_experts
from .hparams.template import note_prompt
from .known_versions import PARAMETERS
from .patching import expect, replace
from .videos import check_plugins

TEXT = {"inputs", "attention_mask", "generation_config"}
"""what ``generate`` gets for a prompt that is text alone"""


def patch(module: ModuleType) -> None:
    """Hook the engine's four methods, and the function that chooses its template; all or none."""
    check_plugins()
    engine: Any = module.HuggingfaceEngine
    stock_process = expect(engine, "_process_args")
    stock_chat = expect(engine, "_chat")
    stock_start = expect(engine, "_stream_chat")
    stock_stream = expect(engine, "stream_chat")
    stock_template = expect(module, "get_template_and_fix_tokenizer")

    def get_template_and_fix_tokenizer(tokenizer: Any, data_args: Any) -> Any:
        template = stock_template(tokenizer, data_args)
        # a template of another kind says nothing; a load with use_kt looks at what is noted
        with contextlib.suppress(Exception):
            note_prompt(template, tokenizer, data_args.template)
        return template

    def _process_args(*args: Any, **kwargs: Any) -> Any:
        given = _by_name(args, kwargs)
        if not has_kt_experts(given["model"]):
            return stock_process(**given)
        from ..decoding.generate import can_reuse, generate, sample
        from .media import add_token_types, read_media, videos_in_files
        from .videos import with_videos

        generation = _generation(given)
        del given["input_kwargs"]["kt_generation"]
        as_written = given["input_kwargs"].pop("kt_as_written", False)
        if as_written:
            given["template"] = _without_template(given)
        read_media(given)
        with videos_in_files(given):
            given["template"] = with_videos(given["template"], given.get("videos"), given["processor"])
            gen_kwargs, length = stock_process(**given)
        add_token_types(gen_kwargs, given["model"], given["processor"])
        eos = gen_kwargs["generation_config"].eos_token_id
        generation.begin(given["tokenizer"], length, [eos] if isinstance(eos, int) else list(eos or ()))
        chooser = generation.chooser()
        if _is_text(gen_kwargs) and can_reuse(given["model"], gen_kwargs["generation_config"]):
            head = 0 if as_written else _shared(given, gen_kwargs["inputs"][0].tolist())
            gen_kwargs["custom_generate"] = functools.partial(generate, reading=generation, head=head, chooser=chooser)
        elif chooser is not None:
            gen_kwargs["custom_generate"] = functools.partial(sample, chooser=chooser)
        gen_kwargs["stopping_criteria"] = [generation]
        return gen_kwargs, length

    def _chat(*args: Any, **kwargs: Any) -> Any:
        given = _by_name(args, kwargs)
        if not has_kt_experts(given["model"]):
            return stock_chat(**given)
        from .generation import StopText
        from .media import each_answer, read_media

        generation = _generation(given)
        if generation.stopped:  # while it waited for the semaphore
            return [module.Response(response_text="", response_length=0, prompt_length=0, finish_reason="stop")]
        read_media(given)  # once for all answers: what comes from the network cannot be read again
        stop_strings = generation.stop_strings
        try:
            responses = [response for call in each_answer(given) for response in stock_chat(**call)]
        except StopIteration as error:  # of a model's code; no future takes one, so the chat would wait forever
            raise RuntimeError("The model's code ended in a StopIteration.") from error
        if generation.wishes:  # as a stream has it: LLaMA-Factory leaves out blanks before punctuation, in JSON too
            skip = given["generating_args"].get("skip_special_tokens", True)
            for response, chosen in zip(responses, generation.chosen, strict=False):
                ids = [one.token for one in chosen]
                response.response_text = given["tokenizer"].decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )
        for response in responses:
            cut = StopText(stop_strings)
            response.response_text = cut.feed(response.response_text) + cut.end()
            if cut.found:
                response.finish_reason = "stop"
        return responses

    def _stream_chat(*args: Any, **kwargs: Any) -> Callable[[], str]:
        given = _by_name(args, kwargs)
        if not has_kt_experts(given["model"]):
            stock: Callable[[], str] = stock_start(**given)
            return stock
        generation = _generation(given)
        if generation.stopped:  # as in _chat
            return _nothing
        gen_kwargs, _ = engine._process_args(**given)
        return _start(given["model"], given["tokenizer"], gen_kwargs, generation)

    async def stream_chat(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        generation = None
        if has_kt_experts(self.model):
            from .generation import Generation

            generation = kwargs.setdefault("kt_generation", Generation())
        try:
            async with contextlib.aclosing(stock_stream(self, *args, **kwargs)) as texts:
                async for text in texts:
                    yield text
        finally:  # also when the client is gone
            if generation is not None:
                generation.stop()

    replace(engine, _process_args, _chat, _stream_chat, stream_chat)
    replace(module, get_template_and_fix_tokenizer)


def _by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(PARAMETERS, args, strict=False)) | kwargs


def _is_text(gen_kwargs: dict[str, Any]) -> bool:
    """Whether a prompt has nothing but text; some models are told so for each token."""
    from ..decoding.generate import TOKEN_TYPES

    types = {name: value for name, value in gen_kwargs.items() if name in TOKEN_TYPES}
    return gen_kwargs.keys() <= TEXT | types.keys() and not any(bool(value.any()) for value in types.values())


def _shared(given: dict[str, Any], ids: list[int]) -> int:
    """How many tokens of a prompt come before the first message: the system prompt and the tools. 0 where nobody wants to know."""
    from ..model.state import kt_state

    prompts = kt_state(given["model"]).prompts
    if prompts is None or prompts.directory is None:
        return 0
    answer = {"role": "assistant", "content": ""}
    questions = ([{"role": "user", "content": text}, answer] for text in ("a", "1"))
    what = given["tokenizer"], given.get("system"), given.get("tools")
    tokens = (given["template"].encode_oneturn(what[0], question, *what[1:])[0] for question in questions)
    alike = takewhile(lambda same: len({*same}) == 1, zip(ids, *tokens, strict=False))
    return sum(1 for _ in alike)


def _without_template(given: dict[str, Any]) -> Any:
    """A copy of the template that writes a conversation's one message as it is, with the tokens that the tokenizer puts around a text."""
    template, text = copy.copy(given["template"]), given["messages"][0]["content"]
    template.encode_oneturn = lambda tokenizer, *_, **__: (tokenizer.encode(text), [])
    return template


def _generation(given: dict[str, Any]) -> Any:
    """The request's Generation, made if the caller brought none; ``stop`` moves into it."""
    from .generation import Generation, generation_of_request

    keys = given["input_kwargs"] = {} if given.get("input_kwargs") is None else given["input_kwargs"]
    generation = keys.setdefault("kt_generation", generation_of_request.get() or Generation())
    if stop := keys.pop("stop", None):
        generation.stop_strings = (stop,) if isinstance(stop, str) else tuple(filter(None, stop))
    return generation


def _nothing() -> str:
    raise StopAsyncIteration


def _start(model: Any, tokenizer: Any, gen_kwargs: dict[str, Any], generation: Any) -> Callable[[], str]:
    """Generate in a thread; the returned function gives the next piece of text, or raises StopAsyncIteration."""
    from transformers import TextIteratorStreamer, set_seed

    from .generation import StopText

    if (seed := gen_kwargs.pop("_seed", None)) is not None:  # LLaMA-Factory 0.9.6's own methods do the same
        set_seed(seed)
    skip = getattr(gen_kwargs["generation_config"], "skip_special_tokens", True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=skip)
    if (custom := gen_kwargs.get("custom_generate")) is not None:  # to which transformers does not pass it
        gen_kwargs["custom_generate"] = functools.partial(custom, streamer=streamer)
    cut = StopText(generation.stop_strings)

    def generate() -> None:
        try:
            model.generate(**gen_kwargs, streamer=streamer)
        except StopIteration as error:  # for the reader it would be the end of the text
            generation.error = RuntimeError("The model's code ended in a StopIteration.")
            generation.error.__cause__ = error
        except BaseException as error:
            generation.error = error
        finally:
            streamer.end()  # harmless if it has ended already; otherwise the reader would wait forever

    thread = Thread(target=generate, daemon=True)
    thread.start()

    def stream() -> str:
        try:
            text = cut.feed(next(streamer))
        except StopIteration:
            if rest := cut.end():
                streamer.text_queue.put(streamer.stop_signal)
                return rest
            thread.join()
            if generation.error is not None:
                raise generation.error from None
            raise StopAsyncIteration from None
        if cut.found:
            generation.stop()
        return text

    return stream
