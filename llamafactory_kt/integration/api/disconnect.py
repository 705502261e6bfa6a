"""Stops answers that nobody wants any more, because the client disconnected or the server is shutting down.

Stock LLaMA-Factory generates an answer that is not streamed to its end; until then it ignores other requests and SIGTERM.
The shutdown is seen in ``AppStatus.should_exit`` of sse-starlette 3, which also ends LLaMA-Factory's streams; without it, only
disconnects stop an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ..generation import Generation, generation_of_request
from .errors import BadRequest

MOST_BYTES = 128 * 2**20
"""of a request"""
_POLL_SECONDS = 0.5
GONE = "llamafactory_kt.gone"
"""in a request's scope: the client has disconnected"""

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]


class StopUnwanted:
    """ASGI middleware. Gives each request a :class:`Generation`, and stops it once nobody wants the answer; bounds its size."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        generation, complete = Generation(), asyncio.Event()

        size = 0

        async def receive_body() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_BYTES:
                raise BadRequest(f"The request is larger than {MOST_BYTES >> 20} MiB.")
            if not message.get("more_body"):
                complete.set()
            return message

        token = generation_of_request.set(generation)
        watcher = asyncio.create_task(_stop_when_unwanted(scope, generation, complete, receive))
        try:
            await self.app(scope, receive_body, send)
        finally:
            watcher.cancel()
            generation_of_request.reset(token)


async def _stop_when_unwanted(scope: Any, generation: Generation, complete: asyncio.Event, receive: Receive) -> None:
    """After the whole body, ``receive`` returns only when the client disconnects."""
    from sse_starlette import sse

    app_status = getattr(sse, "AppStatus", None)
    await complete.wait()
    while not getattr(app_status, "should_exit", False):
        try:
            message = await asyncio.wait_for(receive(), _POLL_SECONDS)
        except TimeoutError:
            continue
        if message["type"] == "http.disconnect":
            scope[GONE] = True
            break
    generation.stop()
