"""A request is checked as a whole, and becomes a question to the engine, before anything is generated."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

from ...ground.errors import KTError, describe
from ..generation import Generation
from ..known_versions import PARAMETERS, REQUEST
from ..sglang_engine import KTSGLangEngine
from . import completions, sampling
from .answers import Question
from .completions import TextRequest
from .conversation import read_conversation
from .errors import CONTEXT_LENGTH_EXCEEDED, BadRequest
from .forms import ChatForm, TextForm
from .grammar import GrammarsOfChat
from .models import Models
from .protocol import chat_request
from .protocol.chat_request import ChatRequest
from .sampling import Sampled

logger = logging.getLogger("llamafactory_kt")

MOST_CHARACTERS_OF_A_TOKEN = 128
"""on average, over a conversation: a longer one is refused before it is tokenized, which takes seconds and a GiB a few million"""
_CONTROLS = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""what JSON leaves as it is, and a terminal obeys"""


def prepare_chat(request: ChatRequest, engine: Any, models: Models, grammars: GrammarsOfChat) -> Question:
    """Check everything about a request, and read its media.

    Raises:
        NotFound: It names an adapter that there is not.
        BadRequest: Everything that is wrong with it.
        KTError: The conversation does not fit this chat.
    """
    adapter = models.adapter(request.model)
    _check(request, engine)
    _log(request)
    wishes = dataclasses.replace(request.wishes(), matcher=grammars.of(request))
    conversation = read_conversation(request, engine.template)
    asked = _asked(request, conversation, len(request.messages), engine)
    form = ChatForm(engine.template, bool(conversation["tools"]), request.parallel_tool_calls is False)
    return Question(request, asked, wishes, form, adapter)


def prepare_text(request: TextRequest, engine: Any, models: Models) -> Question:
    """The same for a text that shall go on.

    Raises:
        NotFound: As :func:`prepare_chat`.
        BadRequest: Everything that is wrong with it.
    """
    adapter = models.adapter(request.model)
    if isinstance(engine, KTSGLangEngine):
        raise BadRequest("/v1/completions cannot be asked for with infer_backend: sglang and use_kt.", "prompt")
    _check(request, engine)
    _log(request)
    asked = _asked(request, completions.conversation(request) | {"kt_as_written": True}, 1, engine)
    return Question(request, asked, request.wishes(), TextForm(), adapter)


def _asked(request: Sampled, conversation: dict[str, Any], messages: int, engine: Any) -> dict[str, Any]:
    """The conversation and how to answer it, once it is known to fit into the model's context."""
    _check_text(request, conversation, messages, engine)
    asked = conversation | request.sampling(engine)
    _check_length(request, engine, _prompt_tokens(request, asked, engine))
    return asked


def _log(request: Sampled) -> None:
    """As LLaMA-Factory does, but without megabytes of pictures."""
    if os.environ.get("API_VERBOSE", "1").lower() in ("true", "y", "1"):
        text = json.dumps(_cut(request.model_dump(exclude_unset=True)), indent=2, ensure_ascii=False)
        logger.info("==== request ====\n%s", _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _cut(value: Any) -> Any:
    """A request as the log shows it, without the most of its long texts.

    >>> _cut({"messages": ["x" * 2000, "short"]})["messages"][0][998:], _cut(["short", 1])
    ('xx... (2000 characters)', ['short', 1])
    """
    if isinstance(value, dict):
        return {key: _cut(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_cut(one) for one in value]
    return f"{value[:1000]}... ({len(value)} characters)" if isinstance(value, str) and len(value) > 1000 else value


def _check(request: Sampled, engine: Any) -> None:
    """Raise BadRequest with everything that is wrong with the request, before its conversation is read."""
    try:
        json.dumps(request.model_dump(), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can encode half of a surrogate pair, UTF-8 cannot
        raise BadRequest("The request holds text that is not Unicode: one half of a surrogate pair.") from None
    except (RecursionError, ValueError):
        raise BadRequest("The request is nested too deeply.") from None
    is_chat = isinstance(request, ChatRequest)
    problems = list(sampling.problems(request, engine, (chat_request if is_chat else completions).REFUSED))
    if isinstance(request, ChatRequest):
        problems += _problems_of_chat(request, engine)
    if problems:
        raise BadRequest(" ".join(text for _, text in problems), problems[0][0])


def _problems_of_chat(request: ChatRequest, engine: Any) -> Iterator[tuple[str, str]]:
    if request.top_logprobs and not request.logprobs:
        yield "top_logprobs", "top_logprobs: only with logprobs: true."
    if (
        None not in (request.max_tokens, request.max_completion_tokens)
        and request.max_tokens != request.max_completion_tokens
    ):
        yield "max_tokens", "max_tokens: it differs from max_completion_tokens, which is the same field; leave one out."
    there = {tool.function.name for tool in request.tools or ()}
    for name in request.chosen_names() or ():
        if name not in there:
            yield "tool_choice", f"tool_choice: {name!r} is not among the tools."
            break
    if isinstance(engine, KTSGLangEngine):
        for n, message in enumerate(request.messages):
            if any(part.type != "text" for part in message.parts()):
                yield (
                    "messages",
                    f"messages[{n}] has more than text, which infer_backend: sglang cannot take with use_kt.",
                )


def _prompt_tokens(request: Sampled, asked: dict[str, Any], engine: Any) -> int:
    """The prompt's length, by doing all that the engine does before it generates.

    Raises:
        BadRequest: Something in it fails, such as a template that cannot write the conversation.
        KTError: The conversation does not fit this chat.
    """
    messages = [dict(message) for message in asked["messages"]]
    try:
        if isinstance(engine, KTSGLangEngine):
            pair = [*messages, {"role": "assistant", "content": ""}]
            prompt, _ = engine.template.encode_oneturn(engine.tokenizer, pair, asked["system"], asked["tools"])
            return len(prompt)
        keys = {name: getattr(engine, name) for name in PARAMETERS[:5]}
        with torch.inference_mode():
            _, length = engine._process_args(
                **keys,
                **{name: asked[name] for name in REQUEST[1:-1]},
                messages=messages,
                input_kwargs={k: v for k, v in asked.items() if k not in REQUEST} | {"kt_generation": Generation()},
            )
    except KTError:
        raise
    except Exception as error:  # of templates, processors and libraries that read media: a dozen types
        raise BadRequest(f"The conversation cannot be made a prompt: {describe(error)}", request.source) from error
    for file in (*(asked["videos"] or ()), *(asked["audios"] or ())):
        file.seek(0)
    return int(length)


def _context(engine: Any) -> int | None:
    if isinstance(engine, KTSGLangEngine):
        context: Any = engine.context_length
    else:
        context = getattr(engine.model.config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) else None


def _check_text(request: Sampled, conversation: dict[str, Any], messages: int, engine: Any) -> None:
    """Refuse what cannot fit into the model's context, however it is tokenized."""
    context = _context(engine)
    texts = [
        *(message["content"] for message in conversation["messages"]),
        conversation["system"] or "",
        conversation["tools"] or "",
    ]
    characters = sum(map(len, texts))
    if context is not None and max(messages, characters // MOST_CHARACTERS_OF_A_TOKEN) > context:
        raise BadRequest(
            f"The model's context has {context} tokens, which cannot hold {messages} messages with {characters} characters.",
            request.source,
            CONTEXT_LENGTH_EXCEEDED,
        )


def _check_length(request: Sampled, engine: Any, prompt: int) -> None:
    """Refuse what does not fit into the model's context."""
    context = _context(engine)
    asked = request.most_tokens() or 1
    if context is not None and prompt + asked > context:
        raise BadRequest(
            f"The model's context has {context} tokens; the {request.source} take{'s' if request.source == 'prompt' else ''} {prompt}, and max_tokens asks for {asked}.",
            request.source if prompt >= context else "max_tokens",
            CONTEXT_LENGTH_EXCEEDED,
        )
