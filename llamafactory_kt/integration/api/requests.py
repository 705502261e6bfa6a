"""``llamafactory.api.app``: requests to a model with KT experts, in this process or in SGLang, are OpenAI's and are checked as a whole
before generation, and answers that nobody wants any more are stopped.

Stock LLaMA-Factory refuses conversations that OpenAI's API takes, finds some mistakes only after a stream has begun (status 200, then a
broken connection), and others while generating (status 500). Other models are left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

from fastapi import HTTPException

from ...ground.errors import KTHookError
from ...model.state import has_kt_experts
from ..generation import Generation, generation_of_request
from ..listening import API, listening_locally
from ..patching import expect, replace, versions
from ..sglang_engine import KTSGLangEngine
from . import answers
from .answers import Question
from .checking import prepare_chat, prepare_text
from .completions import TextRequest
from .disconnect import StopUnwanted
from .errors import answer_errors
from .grammar import GrammarsOfChat
from .metrics import CountRequests, Metrics
from .models import Models, healthy
from .protocol.chat_request import ChatRequest
from .sampling import Sampled
from .turns import AdapterTurns

PATH, MODELS = "/v1/chat/completions", "/v1/models"
_READERS = 32
SEND_SECONDS = 60.0
"""for a client to take a part of a stream, while others may wait for its end"""


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
    """Put our endpoints in place of LLaMA-Factory's, with its check of the key."""
    from sse_starlette import EventSourceResponse

    chat, _ = _taken_out(app, PATH), _taken_out(app, MODELS)
    engine = chat_model.engine
    # not asyncio's own threads, which answers need while downloads are slow
    readers = ThreadPoolExecutor(_READERS, "reading_requests")
    grammars, models = GrammarsOfChat(engine), Models(engine)
    metrics = Metrics(engine, models.name)
    turns = AdapterTurns(getattr(engine, "model", None), metrics.switched)
    turns.prepare()

    async def answer(request: Sampled, prepare: Callable[..., Question], *more: Any) -> Any:
        if not engine.can_generate:
            raise HTTPException(status_code=405, detail="Not allowed")
        loop = asyncio.get_running_loop()
        question = await loop.run_in_executor(readers, prepare, request, engine, models, *more)
        generation = generation_of_request.get() or Generation()
        if request.stream:
            events = answers.stream(question, chat_model, generation, turns, metrics)
            return EventSourceResponse(events, media_type="text/event-stream", sep="\n", send_timeout=SEND_SECONDS)
        return await answers.whole(question, chat_model, generation, turns, metrics)

    async def create_chat_completion(request: ChatRequest) -> Any:
        return await answer(request, prepare_chat, grammars)

    async def create_completion(request: TextRequest) -> Any:
        return await answer(request, prepare_text)

    keyed = {"dependencies": chat.dependencies}
    app.post(PATH, response_model=chat.response_model, **keyed)(create_chat_completion)
    app.post("/v1/completions", **keyed)(create_completion)
    app.get(MODELS, **keyed)(models.listed)
    app.get(f"{MODELS}/{{name:path}}", **keyed)(models.found)
    app.get("/metrics", **keyed)(metrics.shown)
    app.get("/health")(healthy)
    app.add_middleware(StopUnwanted)
    app.add_middleware(CountRequests, metrics=metrics)
    answer_errors(app)


def _taken_out(app: Any, path: str) -> Any:
    """The application's own route of a path, which it no longer has."""
    found = [route for route in app.router.routes if getattr(route, "path", None) == path]
    if len(found) != 1:
        raise KTHookError(
            f"llamafactory.api.app.create_app: found {len(found)} routes {path}, expected 1. Installed: {versions()}."
        )
    app.router.routes.remove(found[0])
    return found[0]
