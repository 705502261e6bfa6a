"""``llamafactory.api.app``: requests to a model with KT experts, in this process or in SGLang, are checked before
anything is generated or streamed, and answers that nobody waits for are not generated to their end.

Stock LLaMA-Factory finds some mistakes only after a stream has begun (status 200, then a broken connection), others in
the middle of generating (status 500), and calls the end of every stream ``stop``. Other models are left alone.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import AsyncIterator
from types import ModuleType
from typing import Any

from fastapi import HTTPException

from ...model.state import has_kt_experts
from ..generation import Generation, generation_of_request
from ..patching import expect, is_patched, replace
from ..sglang_engine import KTSGLangEngine
from .disconnect import StopUnwanted
from .errors import CONTEXT_LENGTH_EXCEEDED, BadRequest, answer_errors, of_exception

MOST_ANSWERS = 128
"""``n`` at most, as in OpenAI's API; without SGLang, all answers of a request are one batch in memory"""


def patch(module: ModuleType) -> None:
    """Replace what makes the application, and the two functions that its endpoint looks up when it is called."""
    if is_patched(module):
        return
    whole_stock = expect(module, "create_chat_completion_response", ("request", "chat_model"))
    stream_stock = expect(module, "create_stream_chat_completion_response", ("request", "chat_model"))
    app_stock = expect(module, "create_app", ("chat_model",))

    @functools.wraps(app_stock)
    def create_app(chat_model: Any) -> Any:
        app = app_stock(chat_model)
        if _is_ours(chat_model.engine):
            app.add_middleware(StopUnwanted)
            answer_errors(app)
        return app

    @functools.wraps(whole_stock)
    async def whole(request: Any, chat_model: Any) -> Any:
        if _is_ours(chat_model.engine):
            _check(request, chat_model)
        answer = await whole_stock(request, chat_model)
        _refuse_half()
        return answer

    @functools.wraps(stream_stock)
    def stream(request: Any, chat_model: Any) -> AsyncIterator[str]:
        if not _is_ours(chat_model.engine):
            stock: AsyncIterator[str] = stream_stock(request, chat_model)
            return stock
        _check(request, chat_model)
        return _stream(request, chat_model)

    replace(
        module,
        create_app=create_app,
        create_chat_completion_response=whole,
        create_stream_chat_completion_response=stream,
    )


def _is_ours(engine: Any) -> bool:
    return isinstance(engine, KTSGLangEngine) or has_kt_experts(getattr(engine, "model", None))


def _refuse_half() -> None:
    """Raise HTTPException where the server, and not the model, ended the answer."""
    generation = generation_of_request.get()
    if generation is not None and generation.stopped:
        raise HTTPException(status_code=503, detail="The server is shutting down; the answer was not finished.")


def _check(request: Any, chat_model: Any) -> None:
    """Raise HTTPException with status 400 and all that is wrong with the request."""
    try:
        json.dumps(request.model_dump(), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; tokenizers and answers cannot
        raise BadRequest("The request holds text that is not Unicode: one half of a surrogate pair.") from None
    problems = [
        (name, f"{name}: {value} is not {wanted}.")
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
        problems.append(("n", "Cannot stream multiple responses."))
    if request.stream and request.tools:
        problems.append(("tools", "Cannot stream function calls."))
    texts = [_text(message) for message in request.messages]
    problems += [("messages", f"messages[{n}] has no content.") for n, text in enumerate(texts) if text is None]
    if isinstance(chat_model.engine, KTSGLangEngine):
        problems += [
            ("messages", f"messages[{n}] has more than text, which infer_backend: sglang cannot take with use_kt.")
            for n, message in enumerate(request.messages)
            if isinstance(message.content, list) and any(item.type != "text" for item in message.content)
        ]
    if problems:
        raise BadRequest(" ".join(text for _, text in problems), problems[0][0])
    _check_length(request, chat_model, [text or "" for text in texts])


def _text(message: Any) -> str | None:
    """A message's text; None where it has neither text, parts nor tool calls."""
    if isinstance(message.content, list):
        parts = [item.text for item in message.content if item.type == "text"]
        return None if None in parts or not message.content else "".join(parts)
    return "" if message.content is None and message.tool_calls else message.content


def _check_length(request: Any, chat_model: Any, texts: list[str]) -> None:
    """Compare with the model's context; images and tools, which only add to it, are not counted."""
    engine = chat_model.engine
    context: Any
    if isinstance(engine, KTSGLangEngine):
        context = engine.context_length
    else:
        context = getattr(engine.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int):
        return
    prompt = len(engine.tokenizer.encode("\n".join(texts), add_special_tokens=False))
    asked = request.max_tokens or 1
    if prompt + asked > context:
        raise BadRequest(
            f"The model's context has {context} tokens; the messages take {prompt}, and max_tokens asks for {asked}.",
            "messages" if prompt >= context else "max_tokens",
            CONTEXT_LENGTH_EXCEEDED,
        )


def _stream(request: Any, chat_model: Any) -> AsyncIterator[str]:
    """Check the messages, and return the chunks of LLaMA-Factory's own stream with the reason why the answer ended."""
    from llamafactory.api.chat import _create_stream_chat_completion_chunk as create_chunk
    from llamafactory.api.chat import _process_request
    from llamafactory.api.protocol import ChatCompletionMessage, Finish, Role

    processed = _process_request(request)
    generation = generation_of_request.get() or Generation()
    name = f"chatcmpl-{uuid.uuid4().hex}"

    def chunk(finish_reason: Any = None, **delta: Any) -> str:
        text: str = create_chunk(
            completion_id=name, model=request.model, delta=ChatCompletionMessage(**delta), finish_reason=finish_reason
        )
        return text

    async def chunks() -> AsyncIterator[str]:
        yield chunk(role=Role.ASSISTANT, content="")
        try:
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
        except Exception as error:  # the status was sent long ago; the openai client raises what it finds here
            yield json.dumps(of_exception(error), ensure_ascii=False)
            return
        yield chunk(finish_reason=Finish(generation.finish_reason))
        yield "[DONE]"

    return chunks()
