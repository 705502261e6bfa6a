"""``llamafactory.chat.hf_engine``: answers of a model with KT experts can be stopped, end at stop strings, and an error
while generating reaches whoever asked. Stock LLaMA-Factory goes on generating for clients that went away, ignores
``stop``, and waits for ever for a thread that has raised. Other models are left alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from threading import Thread
from types import ModuleType
from typing import Any

from ..model.state import has_kt_experts
from .patching import expect, is_patched, replace

_REQUEST = ("messages", "system", "tools", "images", "videos", "audios", "input_kwargs")
_PARTS = ("model", "tokenizer", "processor", "template", "generating_args", *_REQUEST)


def patch(module: ModuleType) -> None:
    """Hook the engine's four methods; all or none."""
    if is_patched(module):
        return
    engine: Any = module.HuggingfaceEngine
    process_stock = expect(engine, "_process_args", _PARTS)
    chat_stock = expect(engine, "_chat", _PARTS)
    start_stock = expect(engine, "_stream_chat", _PARTS)
    stream_stock = expect(engine, "stream_chat", ("self", *_REQUEST))

    @functools.wraps(process_stock)
    def process_args(*args: Any, **kwargs: Any) -> Any:
        parts = dict(zip(_PARTS, args, strict=False)) | kwargs
        if not has_kt_experts(parts["model"]):
            return process_stock(*args, **kwargs)
        generation = _generation(parts)
        del parts["input_kwargs"]["kt_generation"]
        gen_kwargs, length = process_stock(**parts)
        eos = gen_kwargs["generation_config"].eos_token_id
        generation.begin(parts["tokenizer"], length, [eos] if isinstance(eos, int) else list(eos or ()))
        gen_kwargs["stopping_criteria"] = [generation]
        return gen_kwargs, length

    @functools.wraps(chat_stock)
    def chat(*args: Any, **kwargs: Any) -> Any:
        parts = dict(zip(_PARTS, args, strict=False)) | kwargs
        if not has_kt_experts(parts["model"]):
            return chat_stock(*args, **kwargs)
        from .generation import StopText

        generation = _generation(parts)
        if generation.stopped:  # while it waited for its turn
            return [module.Response(response_text="", response_length=0, prompt_length=0, finish_reason="stop")]
        stop_strings = generation.stop_strings
        responses = chat_stock(**parts)
        for response in responses:
            cut = StopText(stop_strings)
            response.response_text = cut.feed(response.response_text) + cut.end()
            if cut.found:
                response.finish_reason = "stop"
        return responses

    @functools.wraps(start_stock)
    def start_stream(*args: Any, **kwargs: Any) -> Callable[[], str]:
        parts = dict(zip(_PARTS, args, strict=False)) | kwargs
        if not has_kt_experts(parts["model"]):
            stock: Callable[[], str] = start_stock(*args, **kwargs)
            return stock
        generation = _generation(parts)
        gen_kwargs, _ = engine._process_args(**parts)
        return _start(parts["model"], parts["tokenizer"], gen_kwargs, generation)

    @functools.wraps(stream_stock)
    async def stream_chat(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        generation = None
        if has_kt_experts(self.model):
            from .generation import Generation

            generation = kwargs.setdefault("kt_generation", Generation())
        try:
            async with contextlib.aclosing(stream_stock(self, *args, **kwargs)) as texts:
                async for text in texts:
                    yield text
        finally:  # also where the client has gone
            if generation is not None:
                generation.stop()

    replace(
        engine,
        _process_args=staticmethod(process_args),
        _chat=staticmethod(chat),
        _stream_chat=staticmethod(start_stream),
        stream_chat=stream_chat,
    )
    replace(module)  # marks it


def _generation(parts: dict[str, Any]) -> Any:
    """The request's Generation, made where the caller brought none; ``stop`` moves into it."""
    from .generation import Generation, generation_of_request

    keys = parts["input_kwargs"] = {} if parts.get("input_kwargs") is None else parts["input_kwargs"]
    generation = keys.setdefault("kt_generation", generation_of_request.get() or Generation())
    stop = keys.pop("stop", None)
    if stop:
        generation.stop_strings = (stop,) if isinstance(stop, str) else tuple(text for text in stop if text)
    return generation


def _start(model: Any, tokenizer: Any, gen_kwargs: dict[str, Any], generation: Any) -> Callable[[], str]:
    """Generate in a thread; returns what gives the next piece of text, or raises StopAsyncIteration."""
    from transformers import TextIteratorStreamer

    from .generation import StopText

    skip = getattr(gen_kwargs["generation_config"], "skip_special_tokens", True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=skip)
    cut = StopText(generation.stop_strings)

    def generate() -> None:
        try:
            model.generate(**gen_kwargs, streamer=streamer)
        except BaseException as error:
            generation.error = error
        finally:
            streamer.end()  # once more does no harm; not at all would let the reader wait for ever

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
