"""``llamafactory.api.app``: requests to a model with KT experts, in this process or in SGLang, are OpenAI's and are checked as a whole
before generation, and answers that nobody wants any more are stopped.

Stock LLaMA-Factory refuses conversations that OpenAI's API takes, finds some mistakes only after a stream has begun (status 200, then a
broken connection), and others while generating (status 500). Other models are left alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from fastapi import HTTPException

from ...ground.errors import KTError, KTHookError, describe
from ...model.state import has_kt_experts
from ..generation import Generation, generation_of_request
from ..known_versions import PARAMETERS
from ..listening import API, listening_locally
from ..patching import expect, replace, versions
from ..sglang_engine import KTSGLangEngine
from . import answers, sampling
from .conversation import read_conversation
from .disconnect import StopUnwanted
from .errors import CONTEXT_LENGTH_EXCEEDED, BadRequest, answer_errors
from .forms import ChatForm
from .grammar import GrammarsOfChat
from .protocol import REFUSED, ChatRequest, ToolChoice

logger = logging.getLogger("llamafactory_kt")

PATH = "/v1/chat/completions"
_READERS = 32
MOST_CHARACTERS_OF_A_TOKEN = 128
"""on average, over a conversation: a longer one is refused before it is tokenized, which takes seconds and a GiB a few million"""
SEND_SECONDS = 60.0
"""for a client to take a part of a stream, while others may wait for its end"""
_CONTROLS = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""what JSON leaves as it is, and a terminal obeys"""


def patch(module: ModuleType) -> None:
    """Replace the application's factory, and what runs it."""
    stock_app = expect(module, "create_app")
    stock_run = expect(module, "run_api")

    def create_app(chat_model: Any) -> Any:
        app = stock_app(chat_model)
        if _is_ours(chat_model.engine):
            _take_over(app, chat_model)
        return app

    def run_api() -> None:
        with listening_locally(API):
            stock_run()

    replace(module, create_app, run_api)


def _is_ours(engine: Any) -> bool:
    return isinstance(engine, KTSGLangEngine) or has_kt_experts(getattr(engine, "model", None))


def _take_over(app: Any, chat_model: Any) -> None:
    """Put our endpoint in place of LLaMA-Factory's, with its path and its check of the key."""
    from sse_starlette import EventSourceResponse

    found = [route for route in app.router.routes if getattr(route, "path", None) == PATH]
    if len(found) != 1:
        raise KTHookError(
            f"llamafactory.api.app.create_app: found {len(found)} routes {PATH}, expected 1. Installed: {versions()}."
        )
    (stock,) = found
    # not asyncio's own threads, which answers need while downloads are slow
    readers = ThreadPoolExecutor(_READERS, "reading_requests")
    grammars = GrammarsOfChat(chat_model.engine)

    async def create_chat_completion(request: ChatRequest) -> Any:
        if not chat_model.engine.can_generate:
            raise HTTPException(status_code=405, detail="Not allowed")
        loop = asyncio.get_running_loop()
        question = await loop.run_in_executor(readers, prepare, request, chat_model.engine, grammars)
        generation = generation_of_request.get() or Generation()
        if request.stream:
            events = answers.stream(question, chat_model, generation)
            return EventSourceResponse(events, media_type="text/event-stream", sep="\n", send_timeout=SEND_SECONDS)
        return await answers.whole(question, chat_model, generation)

    app.router.routes.remove(stock)
    app.post(PATH, response_model=stock.response_model, dependencies=stock.dependencies)(create_chat_completion)
    app.add_middleware(StopUnwanted)
    answer_errors(app)


def prepare(request: ChatRequest, engine: Any, grammars: GrammarsOfChat) -> answers.Question:
    """Check everything about a request, and read its media.

    Raises:
        BadRequest: Everything that is wrong with it.
        KTError: The conversation does not fit this chat.
    """
    _check(request, engine)
    _log(request)
    wishes = dataclasses.replace(request.wishes(), matcher=grammars.of(request))
    conversation = read_conversation(request, engine.template)
    _check_text(conversation, len(request.messages), engine)
    asked = request.sampling(engine)
    _check_length(request, engine, _prompt_tokens(conversation, asked, engine))
    form = ChatForm(engine.template, bool(conversation["tools"]), request.parallel_tool_calls is False)
    return answers.Question(request, conversation | asked, wishes, form)


def _log(request: ChatRequest) -> None:
    """As LLaMA-Factory does, but without megabytes of pictures."""
    if os.environ.get("API_VERBOSE", "1").lower() in ("true", "y", "1"):
        text = json.dumps(_cut(request.model_dump(exclude_unset=True)), indent=2, ensure_ascii=False)
        logger.info("==== request ====\n%s", _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_cut(one) for one in value]
    return f"{value[:1000]}... ({len(value)} characters)" if isinstance(value, str) and len(value) > 1000 else value


def _check(request: ChatRequest, engine: Any) -> None:
    """Raise BadRequest with everything that is wrong with the request, before its conversation is read."""
    try:
        json.dumps(request.model_dump(), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can encode half of a surrogate pair, UTF-8 cannot
        raise BadRequest("The request holds text that is not Unicode: one half of a surrogate pair.") from None
    except (RecursionError, ValueError):
        raise BadRequest("The request is nested too deeply.") from None
    problems = list(sampling.problems(request, engine, REFUSED))
    if request.top_logprobs and not request.logprobs:
        problems.append(("top_logprobs", "top_logprobs: only with logprobs: true."))
    if isinstance(choice := request.tool_choice, ToolChoice) and not any(
        tool.function.name == choice.function.name for tool in request.tools or ()
    ):
        problems.append(("tool_choice", f"tool_choice: {choice.function.name!r} is not among the tools."))
    if isinstance(engine, KTSGLangEngine):
        problems += [
            ("messages", f"messages[{n}] has more than text, which infer_backend: sglang cannot take with use_kt.")
            for n, message in enumerate(request.messages)
            if any(part.type != "text" for part in message.parts())
        ]
    if problems:
        raise BadRequest(" ".join(text for _, text in problems), problems[0][0])


def _prompt_tokens(conversation: dict[str, Any], asked: dict[str, Any], engine: Any) -> int:
    """The prompt's length, by doing all that the engine does before it generates.

    Raises:
        BadRequest: Something in it fails, such as a template that cannot write the conversation.
        KTError: The conversation does not fit this chat.
    """
    messages = [dict(message) for message in conversation["messages"]]
    try:
        if isinstance(engine, KTSGLangEngine):
            pair = [*messages, {"role": "assistant", "content": ""}]
            prompt, _ = engine.template.encode_oneturn(
                engine.tokenizer, pair, conversation["system"], conversation["tools"]
            )
            return len(prompt)
        keys = {name: getattr(engine, name) for name in PARAMETERS[:5]}
        with torch.inference_mode():
            _, length = engine._process_args(
                **keys,
                **{**conversation, "messages": messages},
                input_kwargs={**asked, "kt_generation": Generation()},
            )
    except KTError:
        raise
    except Exception as error:  # of templates, processors and libraries that read media: a dozen types
        raise BadRequest(f"The conversation cannot be made a prompt: {describe(error)}", "messages") from error
    for file in (*(conversation["videos"] or ()), *(conversation["audios"] or ())):
        file.seek(0)
    return int(length)


def _context(engine: Any) -> int | None:
    if isinstance(engine, KTSGLangEngine):
        context: Any = engine.context_length
    else:
        context = getattr(engine.model.config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) else None


def _check_text(conversation: dict[str, Any], messages: int, engine: Any) -> None:
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
            "messages",
            CONTEXT_LENGTH_EXCEEDED,
        )


def _check_length(request: ChatRequest, engine: Any, prompt: int) -> None:
    """Refuse what does not fit into the model's context."""
    context = _context(engine)
    asked = request.most_tokens() or 1
    if context is not None and prompt + asked > context:
        raise BadRequest(
            f"The model's context has {context} tokens; the messages take {prompt}, and max_tokens asks for {asked}.",
            "messages" if prompt >= context else "max_tokens",
            CONTEXT_LENGTH_EXCEEDED,
        )
