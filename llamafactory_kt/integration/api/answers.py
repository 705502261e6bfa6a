"""Answers in the form of OpenAI's API, whole or as a stream.

LLaMA-Factory's own stream knows neither the true finish reason nor calls of tools.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import HTTPException
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse

from ..generation import Generation
from . import protocol
from .errors import of_exception
from .protocol import ChatRequest


async def whole(request: ChatRequest, asked: dict[str, Any], chat_model: Any, generation: Generation) -> Any:
    """A ``ChatCompletionResponse`` of LLaMA-Factory, and how many tokens of the prompt were kept from earlier.

    Args:
        asked: the conversation and how to answer it, as ``ChatModel.achat`` takes them.
    """
    from llamafactory.api import protocol as stock

    responses = await chat_model.achat(**asked, num_return_sequences=request.n)
    if generation.stopped:  # by the server, not by the model
        raise HTTPException(status_code=503, detail="The server is shutting down; the answer was not finished.")
    choices = []
    for index, response in enumerate(responses):
        said = _message(response.response_text, asked["tools"], chat_model)
        reason = stock.Finish(
            "tool_calls" if said.tool_calls else "stop" if response.finish_reason == "stop" else "length"
        )
        choices.append(stock.ChatCompletionResponseChoice(index=index, message=said, finish_reason=reason))
    read, written = responses[0].prompt_length, sum(response.response_length for response in responses)
    usage = stock.ChatCompletionResponseUsage(
        prompt_tokens=read, completion_tokens=written, total_tokens=read + written
    )
    response = stock.ChatCompletionResponse(id=_new_id(), model=request.model, choices=choices, usage=usage)
    return JSONResponse(jsonable_encoder(response) | {"usage": usage.model_dump() | _details(generation.cached_tokens)})


def stream(request: ChatRequest, asked: dict[str, Any], chat_model: Any, generation: Generation) -> AsyncIterator[str]:
    """The events of an answer, or of several one after the other. With tools one comes in one piece: only its end tells whether it is
    a call."""
    head = {"id": _new_id(), "object": "chat.completion.chunk", "created": int(time.time()), "model": request.model}
    counts = bool(request.stream_options and request.stream_options.include_usage)

    def chunk(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        return json.dumps({**head, "choices": choices, **({"usage": usage} if counts else {})}, ensure_ascii=False)

    async def events() -> AsyncIterator[str]:
        read = written = kept = 0
        try:
            for index in range(request.n):
                one = Generation(generation)
                async with contextlib.aclosing(_deltas(asked, chat_model, one)) as deltas:
                    async for delta, reason in deltas:
                        yield chunk([{"index": index, "delta": delta, "finish_reason": reason}])
                read, written = one.prompt_tokens, written + one.tokens
                kept = kept if index else one.cached_tokens  # the answers after the first find all of the prompt
        except Exception as error:  # the status has been sent; the openai client raises this body
            yield json.dumps(of_exception(error), ensure_ascii=False)
            return
        if counts:
            counted = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
            yield chunk([], counted | _details(kept))
        yield "[DONE]"

    return events()


def _details(cached: int) -> dict[str, Any]:
    """How many tokens of a prompt were kept from earlier ones."""
    return {"prompt_tokens_details": {"cached_tokens": cached}}


async def _deltas(
    asked: dict[str, Any], chat_model: Any, generation: Generation
) -> AsyncGenerator[tuple[dict[str, Any], str | None], None]:
    """The pieces of one answer, and with the last the reason of its end."""
    yield {"role": "assistant", "content": ""}, None
    held, reason = "", None
    async with contextlib.aclosing(chat_model.astream_chat(**asked, kt_generation=generation)) as texts:
        async for text in texts:
            if asked["tools"]:
                held += text
            elif text:
                yield {"content": text}, None
    if held:
        calls = _message(held, asked["tools"], chat_model).tool_calls or ()
        # clients put the pieces of a call together by its index
        numbered = [{"index": number, **call.model_dump()} for number, call in enumerate(calls)]
        reason = "tool_calls" if numbered else None
        yield {"tool_calls": numbered} if numbered else {"content": held}, None
    yield {}, reason or generation.finish_reason


def _message(text: str, tools: str | None, chat_model: Any) -> Any:
    """What the model said, or which tools it calls."""
    from llamafactory.api.protocol import ChatCompletionMessage, Function, FunctionCall, Role

    found: Any = text
    if tools:
        try:
            found = chat_model.engine.template.extract_tool(text)
            for call in found if isinstance(found, list) else ():
                protocol.Function(name=call.name, arguments=call.arguments)  # else the client could not send it back
            calls = [
                FunctionCall(id=f"call_{uuid.uuid4().hex}", function=Function(name=call.name, arguments=call.arguments))
                for call in (found if isinstance(found, list) else ())
            ]
        except Exception:  # what a model writes may be almost a call, at which templates' parsers fail
            calls = []
        if calls:
            return ChatCompletionMessage(role=Role.ASSISTANT, tool_calls=calls)
    return ChatCompletionMessage(role=Role.ASSISTANT, content=text)


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
