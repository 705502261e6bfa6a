"""Answers in the form of OpenAI's API, whole or as a stream.

LLaMA-Factory's own stream knows neither the true finish reason nor calls of tools.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import HTTPException

from ..generation import Generation
from .errors import of_exception
from .protocol import ChatRequest


async def whole(request: ChatRequest, asked: dict[str, Any], chat_model: Any, generation: Generation) -> Any:
    """A ``ChatCompletionResponse`` of LLaMA-Factory.

    Args:
        asked: the conversation and how to answer it, as ``ChatModel.achat`` takes them.
    """
    from llamafactory.api import protocol

    responses = await chat_model.achat(**asked, num_return_sequences=request.n)
    if generation.stopped:  # by the server, not by the model
        raise HTTPException(status_code=503, detail="The server is shutting down; the answer was not finished.")
    choices = []
    for index, response in enumerate(responses):
        said = _message(response.response_text, asked["tools"], chat_model)
        reason = protocol.Finish(
            "tool_calls" if said.tool_calls else "stop" if response.finish_reason == "stop" else "length"
        )
        choices.append(protocol.ChatCompletionResponseChoice(index=index, message=said, finish_reason=reason))
    read, written = responses[0].prompt_length, sum(response.response_length for response in responses)
    usage = protocol.ChatCompletionResponseUsage(
        prompt_tokens=read, completion_tokens=written, total_tokens=read + written
    )
    return protocol.ChatCompletionResponse(id=_new_id(), model=request.model, choices=choices, usage=usage)


def stream(request: ChatRequest, asked: dict[str, Any], chat_model: Any, generation: Generation) -> AsyncIterator[str]:
    """The events of an answer. With tools it comes in one piece: only its end tells whether it is a call."""
    from llamafactory.api.chat import _create_stream_chat_completion_chunk
    from llamafactory.api.protocol import ChatCompletionMessage, Finish, Role

    chunk = functools.partial(_create_stream_chat_completion_chunk, completion_id=_new_id(), model=request.model)

    async def events() -> AsyncIterator[str]:
        yield chunk(delta=ChatCompletionMessage(role=Role.ASSISTANT, content=""))
        held, called = "", False
        try:
            async for text in chat_model.astream_chat(**asked, kt_generation=generation):
                if asked["tools"]:
                    held += text
                elif text:
                    yield chunk(delta=ChatCompletionMessage(content=text))
            if held:
                calls = _message(held, asked["tools"], chat_model).tool_calls
                called = bool(calls)
                said = ChatCompletionMessage(tool_calls=calls) if called else ChatCompletionMessage(content=held)
                yield _numbered(chunk(delta=said)) if called else chunk(delta=said)
        except Exception as error:  # the status has been sent; the openai client raises this body
            yield json.dumps(of_exception(error), ensure_ascii=False)
            return
        yield chunk(
            delta=ChatCompletionMessage(), finish_reason=Finish("tool_calls" if called else generation.finish_reason)
        )
        yield "[DONE]"

    return events()


def _message(text: str, tools: str | None, chat_model: Any) -> Any:
    """What the model said, or which tools it calls."""
    from llamafactory.api.protocol import ChatCompletionMessage, Function, FunctionCall, Role

    found: Any = text
    if tools:
        try:
            found = chat_model.engine.template.extract_tool(text)
            calls = [
                FunctionCall(id=f"call_{uuid.uuid4().hex}", function=Function(name=call.name, arguments=call.arguments))
                for call in (found if isinstance(found, list) else ())
            ]
        except Exception:  # what a model writes may be almost a call, at which templates' parsers fail
            calls = []
        if calls:
            return ChatCompletionMessage(role=Role.ASSISTANT, tool_calls=calls)
    return ChatCompletionMessage(role=Role.ASSISTANT, content=text)


def _numbered(chunk: str) -> str:
    """A chunk whose calls have the ``index`` by which clients put pieces together."""
    read = json.loads(chunk)
    for index, call in enumerate(read["choices"][0]["delta"]["tool_calls"]):
        call |= {"index": index, "type": "function"}
    return json.dumps(read, ensure_ascii=False)


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
