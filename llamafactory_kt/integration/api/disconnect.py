"""Answers that nobody waits for any more: the client has gone, or the server is to end. Stock LLaMA-Factory generates an
answer that is not streamed to its end all the same, and so does not answer others, or SIGTERM, until then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ..generation import Generation, generation_of_request

_SECONDS_BETWEEN_LOOKS = 0.5

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]


class StopUnwanted:
    """ASGI middleware. Each request gets a :class:`Generation`, which is stopped when the answer is not wanted any more."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        generation, complete = Generation(), asyncio.Event()

        async def receive_body() -> Message:
            message = await receive()
            if not message.get("more_body"):
                complete.set()
            return message

        token = generation_of_request.set(generation)
        watcher = asyncio.create_task(_stop_when_unwanted(generation, complete, receive))
        try:
            await self.app(scope, receive_body, send)
        finally:
            watcher.cancel()
            generation_of_request.reset(token)


async def _stop_when_unwanted(generation: Generation, complete: asyncio.Event, receive: Receive) -> None:
    """``receive`` says whether the client is there, once it has given the whole body away."""
    from sse_starlette.sse import AppStatus  # LLaMA-Factory's streams end by it too

    await complete.wait()
    while not AppStatus.should_exit:
        try:
            message = await asyncio.wait_for(receive(), _SECONDS_BETWEEN_LOOKS)
        except TimeoutError:
            continue
        if message["type"] == "http.disconnect":
            break
    generation.stop()
