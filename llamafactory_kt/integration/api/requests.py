"""``llamafactory.api.app``: requests to a model with KT experts, in this process or in SGLang, are checked before
generation, and answers that nobody wants any more are stopped.

Stock LLaMA-Factory finds some mistakes only after a stream has begun (status 200, then a broken connection), others while
generating (status 500), and gives every stream the finish reason ``stop``. Other models are left alone.
"""

from __future__ import annotations

import functools
import json
import os
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import Any

from fastapi import HTTPException

from ...ground.errors import describe
from ...model.state import has_kt_experts
from ..generation import Generation, generation_of_request
from ..known_versions import REQUEST
from ..media import read_media
from ..patching import expect, replace
from ..sglang_engine import KTSGLangEngine
from .disconnect import StopUnwanted
from .errors import CONTEXT_LENGTH_EXCEEDED, BadRequest, answer_errors, of_exception

DATA_TYPES = {"image": "png|jpg|jpeg|gif|bmp|webp", "video": "mp4|mkv|avi|mov", "audio": "mpeg|mp3|wav|ogg"}
"""of data URLs; all but webp are those of LLaMA-Factory's ``_process_request``"""
MOST_ANSWERS = 128
"""largest ``n``, as in OpenAI's API; without SGLang, all answers of a request are one batch in memory"""


def patch(module: ModuleType) -> None:
    """Replace the application's factory, the two functions that its endpoint looks up when it is called, and what reads a request."""
    from llamafactory.api import chat

    stock_whole = expect(module, "create_chat_completion_response")
    stock_stream = expect(module, "create_stream_chat_completion_response")
    stock_app = expect(module, "create_app")
    stock_process = expect(chat, "_process_request")
    expect(chat, "_create_stream_chat_completion_chunk")

    def create_app(chat_model: Any) -> Any:
        app = stock_app(chat_model)
        if _is_ours(chat_model.engine):
            app.add_middleware(StopUnwanted)
            answer_errors(app)
        return app

    async def create_chat_completion_response(request: Any, chat_model: Any) -> Any:
        if _is_ours(chat_model.engine):
            _check(request, chat_model)
        answer = await stock_whole(request, chat_model)
        generation = generation_of_request.get()
        if generation is not None and generation.stopped:  # by the server, not by the model
            raise HTTPException(status_code=503, detail="The server is shutting down; the answer was not finished.")
        return answer

    def create_stream_chat_completion_response(request: Any, chat_model: Any) -> AsyncIterator[str]:
        if not _is_ours(chat_model.engine):
            stock: AsyncIterator[str] = stock_stream(request, chat_model)
            return stock
        _check(request, chat_model)
        return _stream(request, chat_model)

    def _process_request(request: Any) -> Any:
        if generation_of_request.get() is None:  # which only requests to our models have
            return stock_process(request)
        try:
            return stock_process(request)
        except HTTPException:
            raise
        except Exception as error:  # Pillow, base64 and requests raise a dozen types; all mean the same here
            raise BadRequest(f"An image, video or audio cannot be read: {describe(error)}", "messages") from error

    replace(chat, _process_request)
    replace(module, create_app, create_chat_completion_response, create_stream_chat_completion_response)


def _is_ours(engine: Any) -> bool:
    return isinstance(engine, KTSGLangEngine) or has_kt_experts(getattr(engine, "model", None))


def _check(request: Any, chat_model: Any) -> None:
    """Raise BadRequest with everything that is wrong with the request."""
    try:
        json.dumps(request.model_dump(), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can encode half of a surrogate pair, UTF-8 cannot
        raise BadRequest("The request holds text that is not Unicode: one half of a surrogate pair.") from None
    limits: tuple[tuple[str, Callable[[float], bool], str], ...] = (
        ("temperature", lambda v: v >= 0, "0 or more"),
        ("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1"),
        ("presence_penalty", lambda v: v >= 0, "0 (none) or a repetition penalty above it"),
        ("max_tokens", lambda v: v >= 1, "1 or more"),
        ("n", lambda v: 1 <= v <= MOST_ANSWERS, f"between 1 and {MOST_ANSWERS}"),
    )
    problems = [
        (name, f"{name}: {value} is not {wanted}.")
        for name, valid, wanted in limits
        if (value := getattr(request, name)) is not None and not valid(value)
    ]
    if request.presence_penalty == 0:  # OpenAI's "none"; for LLaMA-Factory, a repetition penalty of 0
        request.presence_penalty = None
    if request.stream and request.n > 1:
        problems.append(("n", "Cannot stream multiple responses."))
    if request.stream and request.tools:
        problems.append(("tools", "Cannot stream function calls."))
    texts = [_text(message) for message in request.messages]
    problems += [("messages", f"messages[{n}] has no content.") for n, text in enumerate(texts) if text is None]
    problems += [
        ("messages", f"messages[{n}]: {problem}")
        for n, message in enumerate(request.messages)
        for problem in _unreadable(message)
    ]
    if isinstance(chat_model.engine, KTSGLangEngine):
        problems += [
            ("messages", f"messages[{n}] has more than text, which infer_backend: sglang cannot take with use_kt.")
            for n, message in enumerate(request.messages)
            if isinstance(message.content, list) and any(item.type != "text" for item in message.content)
        ]
    if problems:
        raise BadRequest(" ".join(text for _, text in problems), problems[0][0])
    _check_length(request, chat_model, [text or "" for text in texts])
    for message in request.messages:
        _rewrite(message)


def _rewrite(message: Any) -> None:
    """Put into LLaMA-Factory's words what it would cut off, misread or refuse."""
    if message.role == "system":
        message.content = _text(message)  # of several parts it would take the first
    elif message.role == "assistant" and message.tool_calls:  # their arguments would be text within the text
        calls = [(call.function.name, json.loads(call.function.arguments or "{}")) for call in message.tool_calls]
        message.content = json.dumps([{"name": n, "arguments": a} for n, a in calls], ensure_ascii=False)
        message.role, message.tool_calls = type(message.role)("function"), None
    for item in message.content if isinstance(message.content, list) else ():
        if item.image_url is not None:  # Pillow goes by the content
            item.image_url.url = re.sub("^data:image/webp;", "data:image/png;", item.image_url.url)


def _unreadable(message: Any) -> Iterator[str]:
    """What is wrong with a message's media and tool calls; LLaMA-Factory takes data URLs of other types for addresses."""
    for call in message.tool_calls or ():
        if not _is_object(call.function.arguments or "{}"):
            yield f"the arguments of the tool call {call.function.name} are not a JSON object."
    for item in message.content if isinstance(message.content, list) else ():
        if item.type == "text":
            continue
        url, kind = getattr(getattr(item, item.type), "url", None), item.type.removesuffix("_url")
        if message.role == "system":
            yield f"a system prompt takes text alone; put the {kind} into a message of the user."
        elif not url:
            yield f"{item.type} has no url."
        elif url.startswith("data:"):
            if not re.match(rf"data:{kind}/({DATA_TYPES[kind]});base64,.", url):
                expected = DATA_TYPES[kind].replace("|", ", ")
                yield f"{item.type} begins with {url[:40]!r}, expected data:{kind}/TYPE;base64, with one of the types {expected}."
        elif "://" not in url and not os.path.isfile(url):
            yield f"{item.type} {url[:200]!r} is neither a data URL, nor an address with http(s)://, nor a file on the server."


def _is_object(text: str) -> bool:
    """Whether a text is JSON for an object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _text(message: Any) -> str | None:
    """A message's text; None if it has neither text nor tool calls."""
    if isinstance(message.content, list):
        parts = [item.text for item in message.content if item.type == "text"]
        return None if None in parts or not message.content else "".join(parts)
    return "" if message.content is None and message.tool_calls else message.content


def _check_length(request: Any, chat_model: Any, texts: list[str]) -> None:
    """Refuse what cannot fit into the model's context. Images and tools are not counted, so the estimate is low."""
    engine = chat_model.engine
    if isinstance(engine, KTSGLangEngine):
        context: Any = engine.context_length
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
    """Check the messages at once; the returned stream is LLaMA-Factory's own with the true finish reason."""
    from llamafactory.api.chat import _create_stream_chat_completion_chunk, _process_request
    from llamafactory.api.protocol import ChatCompletionMessage, Finish, Role

    processed = _process_request(request)
    if not isinstance(chat_model.engine, KTSGLangEngine):
        given = dict(zip(REQUEST, processed, strict=False))
        parts = {"template": chat_model.engine.template, "processor": chat_model.engine.processor, **given}
        read_media(parts)
        processed = tuple(parts[name] for name in given)
    generation = generation_of_request.get() or Generation()
    chunk = functools.partial(
        _create_stream_chat_completion_chunk, completion_id=f"chatcmpl-{uuid.uuid4().hex}", model=request.model
    )

    async def chunks() -> AsyncIterator[str]:
        yield chunk(delta=ChatCompletionMessage(role=Role.ASSISTANT, content=""))
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
                    yield chunk(delta=ChatCompletionMessage(content=text))
        except Exception as error:  # the status has been sent; the openai client raises this body
            yield json.dumps(of_exception(error), ensure_ascii=False)
            return
        yield chunk(delta=ChatCompletionMessage(), finish_reason=Finish(generation.finish_reason))
        yield "[DONE]"

    return chunks()
