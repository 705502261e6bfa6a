"""``llamafactory.api.app``: requests to a model with KT experts, in this process or in SGLang, are checked before
anything is generated or streamed.

Stock LLaMA-Factory finds some mistakes only after a stream has begun (status 200, then a broken connection), others in
the middle of generating (status 500), and calls the end of every stream ``stop``. Other models are left alone.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any

from .engine import has_kt_experts
from .patching import expect, is_patched, replace
from .sglang_engine import KTSGLangEngine

MOST_ANSWERS = 128
"""``n`` at most, as in OpenAI's API; without SGLang, all answers of a request are one batch in memory"""


def patch(module: ModuleType) -> None:
    """Replace the two functions that the endpoint looks up when it is called."""
    if is_patched(module):
        return
    whole_stock = expect(module, "create_chat_completion_response", ("request", "chat_model"))
    stream_stock = expect(module, "create_stream_chat_completion_response", ("request", "chat_model"))

    @functools.wraps(whole_stock)
    async def whole(request: Any, chat_model: Any) -> Any:
        if _is_ours(chat_model.engine):
            _check(request, chat_model)
        return await whole_stock(request, chat_model)

    @functools.wraps(stream_stock)
    def stream(request: Any, chat_model: Any) -> AsyncIterator[str]:
        if not _is_ours(chat_model.engine):
            stock: AsyncIterator[str] = stream_stock(request, chat_model)
            return stock
        _check(request, chat_model)
        return _stream(request, chat_model)

    replace(module, create_chat_completion_response=whole, create_stream_chat_completion_response=stream)


def _is_ours(engine: Any) -> bool:
    return isinstance(engine, KTSGLangEngine) or has_kt_experts(getattr(engine, "model", None))


def _check(request: Any, chat_model: Any) -> None:
    """Raise HTTPException with status 400 and all that is wrong with the request."""
    from fastapi import HTTPException

    problems = [
        f"{name}: {value:g} is not {wanted}."
        for name, value, right, wanted in (
            ("temperature", request.temperature, lambda v: v >= 0, "0 or more"),
            ("top_p", request.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1"),
            (
                "presence_penalty",
                request.presence_penalty,
                lambda v: v >= 0,
                "0 (none) or a repetition penalty above it",
            ),
            ("max_tokens", request.max_tokens, lambda v: v >= 1, "1 or more"),
            ("n", request.n, lambda v: 1 <= v <= MOST_ANSWERS, f"between 1 and {MOST_ANSWERS}"),
        )
        if value is not None and not right(value)
    ]
    if request.presence_penalty == 0:  # none, in OpenAI's API; LLaMA-Factory takes it for a repetition penalty of 0
        request.presence_penalty = None
    if request.stream and request.n > 1:
        problems.append("Cannot stream multiple responses.")
    if request.stream and request.tools:
        problems.append("Cannot stream function calls.")
    texts = [_text(message) for message in request.messages]
    problems += [f"messages[{number}] has no content." for number, text in enumerate(texts) if text is None]
    if isinstance(chat_model.engine, KTSGLangEngine):
        problems += [
            f"messages[{number}] has more than text, which infer_backend: sglang cannot take with use_kt."
            for number, message in enumerate(request.messages)
            if isinstance(message.content, list) and any(item.type != "text" for item in message.content)
        ]
    if not problems and texts:
        problems += _check_length(request, chat_model, [text or "" for text in texts])
    if problems:
        raise HTTPException(status_code=400, detail=" ".join(problems))


def _text(message: Any) -> str | None:
    """A message's text; None where it has neither text, parts nor tool calls."""
    if isinstance(message.content, list):
        parts = [item.text for item in message.content if item.type == "text"]
        return None if None in parts or not message.content else "".join(parts)
    return "" if message.content is None and message.tool_calls else message.content


def _check_length(request: Any, chat_model: Any, texts: list[str]) -> list[str]:
    """Compare with the model's context; images and tools, which only add to it, are not counted."""
    engine = chat_model.engine
    context: Any
    if isinstance(engine, KTSGLangEngine):
        context = engine.context_length
    else:
        context = getattr(engine.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int):
        return []
    prompt = len(engine.tokenizer.encode("\n".join(texts), add_special_tokens=False))
    asked = request.max_tokens or 1
    if prompt + asked <= context:
        return []
    return [f"The model's context has {context} tokens; the messages take {prompt}, and max_tokens asks for {asked}."]


def _stream(request: Any, chat_model: Any) -> AsyncIterator[str]:
    """Check the messages, and return the chunks of LLaMA-Factory's own stream with the reason why the answer ended."""
    from llamafactory.api.chat import _create_stream_chat_completion_chunk as create_chunk
    from llamafactory.api.chat import _process_request
    from llamafactory.api.protocol import ChatCompletionMessage, Finish, Role

    from ..generation import Generation

    processed = _process_request(request)
    generation = Generation()
    name = f"chatcmpl-{uuid.uuid4().hex}"

    def chunk(finish_reason: Any = None, **delta: Any) -> str:
        text: str = create_chunk(
            completion_id=name, model=request.model, delta=ChatCompletionMessage(**delta), finish_reason=finish_reason
        )
        return text

    async def chunks() -> AsyncIterator[str]:
        yield chunk(role=Role.ASSISTANT, content="")
        async for text in chat_model.astream_chat(
            *processed,
            do_sample=request.do_sample,
            temperature=request.temperature,
            top_p=request.top_p,
            max_new_tokens=request.max_tokens,
            repetition_penalty=request.presence_penalty,
            stop=request.stop,
            kt_generation=generation,
        ):
            if text:
                yield chunk(content=text)
        yield chunk(finish_reason=Finish(generation.finish_reason))
        yield "[DONE]"

    return chunks()
