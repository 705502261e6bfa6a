"""Answers in the form of OpenAI's API, whole or as a stream.

LLaMA-Factory's own stream knows neither the true finish reason nor calls of tools.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from ...decoding.choosing import Chosen, Wishes
from ..generation import Generation
from .errors import of_exception
from .forms import Form
from .logprobs import TokensOfText, vocabulary_of
from .metrics import Metrics
from .sampling import Sampled
from .turns import AdapterTurns


@dataclass(frozen=True)
class Question:
    """A request that has been checked."""

    request: Sampled
    asked: dict[str, Any]
    """the conversation and how to answer it, as ``ChatModel.achat`` takes them"""
    wishes: Wishes
    form: Form
    adapter: str | None
    """which of the adapters to choose from; None: what the configuration applies"""

    def generation(self, whole: Generation | None, number: int) -> Generation:
        """For one of the answers."""
        generation = Generation(whole)
        generation.wishes, generation.number = self.wishes, number
        return generation

    def tokens(self, chat_model: Any, generation: Generation, number: int = 0) -> TokensOfText | None:
        """An answer's tokens with their probabilities, if the request asks for them."""
        if self.wishes.logprobs is None:
            return None
        engine = chat_model.engine
        hides = bool((engine.generating_args or {}).get("skip_special_tokens", True))

        def chosen() -> list[Chosen]:  # generate begins later
            return generation.chosen[number] if number < len(generation.chosen) else []

        return TokensOfText(chosen, vocabulary_of(engine.tokenizer, hides))


async def whole(
    question: Question, chat_model: Any, generation: Generation, turns: AdapterTurns, metrics: Metrics
) -> Any:
    """All answers, and how many tokens of the prompt were kept from earlier.

    Args:
        generation: of the HTTP request.
    """
    request, form = question.request, question.form
    generation.wishes = question.wishes
    with metrics.follow(generation):
        async with turns.turn(question.adapter, generation):
            responses = await chat_model.achat(**question.asked, num_return_sequences=request.n)
    if generation.stopped:  # by the server, not by the model
        raise HTTPException(status_code=503, detail="The server is shutting down; the answer was not finished.")
    choices = []
    for index, response in enumerate(responses):
        said, calls = form.read(response.response_text)
        tokens = question.tokens(chat_model, generation, index)
        reason = "tool_calls" if calls else "stop" if response.finish_reason == "stop" else "length"
        taken = tokens.take(_length(request, response.response_text)) if tokens else None
        choices.append({"index": index, **form.whole(said, calls), **form.logprobs(taken), "finish_reason": reason})
    written = sum(response.response_length for response in responses)
    counted = responses[0].prompt_length, generation.cached_tokens, written
    metrics.tokens(question.adapter, *counted)
    used = _usage(*counted)
    return JSONResponse({**_head(form.whole_object, question), "choices": choices, "usage": used})


def stream(
    question: Question, chat_model: Any, generation: Generation, turns: AdapterTurns, metrics: Metrics
) -> AsyncIterator[str]:
    """The events of an answer, or of several one after the other. With tools one comes in one piece: only its end tells whether it is
    a call."""
    request, form = question.request, question.form
    head = _head(form.chunk_object, question)
    counts = bool(request.stream_options and request.stream_options.include_usage)

    def chunk(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        return json.dumps({**head, "choices": choices, **({"usage": usage} if counts else {})}, ensure_ascii=False)

    async def events() -> AsyncIterator[str]:
        answers: list[Generation] = []
        try:
            for index in range(request.n):
                answers.append(one := question.generation(generation, index))
                with metrics.follow(one):
                    pieces = _pieces(question, chat_model, one)
                    async with turns.turn(question.adapter, one), contextlib.aclosing(pieces):
                        async for piece, reason in pieces:
                            yield chunk([{"index": index, **piece, "finish_reason": reason}])
            if counts:
                yield chunk([], _usage(*_counted(answers)))
            yield "[DONE]"
        except Exception as error:  # the status has been sent; the openai client raises this body
            yield json.dumps(of_exception(error), ensure_ascii=False)
        finally:
            metrics.tokens(question.adapter, *_counted(answers))

    return events()


async def _pieces(
    question: Question, chat_model: Any, generation: Generation
) -> AsyncGenerator[tuple[dict[str, Any], str | None], None]:
    """The pieces of one answer, and with the last the reason of its end."""
    form, tokens = question.form, question.tokens(chat_model, generation)
    said, held, reason = "", "", None

    def piece(delta: dict[str, Any], characters: float) -> dict[str, Any]:
        return delta | form.logprobs(tokens.take(characters) if tokens else None)

    if opening := form.opening():
        yield opening, None
    async with contextlib.aclosing(chat_model.astream_chat(**question.asked, kt_generation=generation)) as texts:
        async for text in texts:
            said += text
            if form.holds:
                held += text
            elif text:
                yield piece(form.delta(text), len(said)), None
    end = _length(question.request, said)
    if held:
        text, calls = form.read(held)
        reason = "tool_calls" if calls else None
        yield piece(form.delta(text, calls), end), None
    yield piece(form.ending(), end), reason or generation.finish_reason


def _length(request: Sampled, text: str) -> float:
    """The characters of an answer whose tokens are reported: all that there are, unless a stop string may have cut it."""
    return len(text) if request.stop else float("inf")


def _head(kind: str, question: Question) -> dict[str, Any]:
    number = f"{question.form.prefix}-{uuid.uuid4().hex}"
    return {"id": number, "object": kind, "created": int(time.time()), "model": question.request.model}


def _counted(answers: list[Generation]) -> tuple[int, int, int]:
    """The arguments of :func:`_usage`. The answers after the first find all of the prompt, which counts once."""
    return answers[0].prompt_tokens, answers[0].cached_tokens, sum(one.tokens for one in answers)


def _usage(read: int, cached: int, written: int) -> dict[str, Any]:
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
