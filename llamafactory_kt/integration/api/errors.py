"""Errors of ``llamafactory-cli api`` in the form of OpenAI's API, which its clients turn into exceptions.

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware import Middleware

from ...ground.errors import KTDataError

logger = logging.getLogger("llamafactory_kt")

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""OpenAI's code for a conversation that is too long"""
LONGEST = 2000
"""characters of a message: some quote what the client sent"""


def body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """``{"error": {...}}`` for an HTTP status.

    Args:
        message: for people.
        status: of the response.
        param: the wrong field of the request.
        code: a word for programs.

    >>> body("temperature: -1 is not 0 or more.", 400, "temperature")["error"]["type"]
    'invalid_request_error'
    """
    kind = "server_error" if status >= 500 else "invalid_request_error"
    message = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
    message = message.encode(errors="backslashreplace").decode()  # it may quote half of a surrogate pair
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of_exception(error: BaseException) -> dict[str, Any]:
    """The body for an error while generating. Logs the traceback, unless the conversation is to blame."""
    if isinstance(error, KTDataError):
        return body(str(error), 400, "messages")
    logger.error("The request ended with an error.", exc_info=error)
    return body(f"{type(error).__name__}: {error}", 500)


class BadRequest(HTTPException):
    """The request is wrong: status 400."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(400, message)
        self.param, self.code = param, code


class NotFound(HTTPException):
    """The request names what does not exist: status 404."""

    param, code = "model", "model_not_found"

    def __init__(self, message: str):
        super().__init__(404, message)


def answer_errors(app: Any) -> None:
    """Give every error of a FastAPI application this body: ours, LLaMA-Factory's, FastAPI's, and uncaught exceptions."""

    async def refused(request: Any, error: Any) -> Any:
        code = "invalid_api_key" if error.status_code == 401 else getattr(error, "code", None)
        content = body(str(error.detail), error.status_code, getattr(error, "param", None), code)
        return JSONResponse(content, error.status_code, headers=error.headers)

    async def malformed(request: Any, error: Any) -> Any:
        # loc: ("body", "messages", 0, "role"); for invalid JSON: ("body", position)
        problems = [(_place(p, error.body), p["msg"].removeprefix("Value error, ")) for p in error.errors()]
        text = "; ".join(f"{place or 'body'}: {problem}" for place, problem in problems)
        if "json" not in request.headers.get("content-type", ""):  # then FastAPI takes the body for text
            text = "The request's Content-Type must be application/json."
        return JSONResponse(body(text, 400, problems[0][0][:100] or None), 400)

    async def unusable(request: Any, error: Any) -> Any:
        return JSONResponse(body(str(error), 400, "messages"), 400)

    app.add_exception_handler(AnyHTTPException, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(KTDataError, unusable)
    app.user_middleware.append(Middleware(AnswerErrors))  # the innermost, so that CORS headers are added to its answers


def _place(problem: Any, sent: Any) -> str:
    """Where a problem is, as in ``messages[0].content``. pydantic names the members of unions too, which are no places in what was sent.

    >>> _place({"loc": ("body", "stop", "list[str]", 1), "type": "string_type"}, {"stop": ["a", 2]})
    'stop[1]'
    >>> _place({"loc": ("body", "messages"), "type": "missing"}, {})
    'messages'
    """
    place = ""
    steps = problem["loc"][1:]
    for number, step in enumerate(steps):
        is_missing = problem["type"] == "missing" and number == len(steps) - 1
        if isinstance(sent, list) and isinstance(step, int):
            place, sent = f"{place}[{step}]", sent[step]
        elif isinstance(sent, dict) and (step in sent or is_missing):
            place, sent = f"{place}.{step}".removeprefix("."), sent.get(step)
    return place


class AnswerErrors:
    """ASGI middleware. Answers uncaught exceptions, and ends them: Starlette would raise them again after its answer, whereupon
    uvicorn closes the connection, on which the client may have sent its next request already."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        begun = False

        async def send_noting(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_noting)
        except Exception as error:
            if scope["type"] != "http":
                raise
            content = of_exception(error)
            if not begun:
                await JSONResponse(content, 500)(scope, receive, send)
