"""What clients of ``llamafactory-cli api`` are told when something is wrong: the body that OpenAI's API has, which its clients
turn into exceptions. https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

logger = logging.getLogger("llamafactory_kt")

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""OpenAI's code for a conversation that is too long; programs look for it"""


def body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """``{"error": {...}}`` for an HTTP status.

    Args:
        param: the field of the request that is wrong.
        code: a word for programs.

    >>> body("temperature: -1 is not 0 or more.", 400, "temperature")["error"]["type"]
    'invalid_request_error'
    """
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of_exception(error: BaseException) -> dict[str, Any]:
    """The body for what went wrong while generating; the traceback goes to the server's log."""
    logger.error("The request ended with an error.", exc_info=error)
    return body(f"{type(error).__name__}: {error}", 500)


class BadRequest(HTTPException):
    """Becomes status 400."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(400, message)
        self.param, self.code = param, code


def answer_errors(app: Any) -> None:
    """Give every error of a FastAPI application this body: ours, LLaMA-Factory's, FastAPI's, and those nobody expected."""

    async def refused(request: Any, error: Any) -> Any:
        code = "invalid_api_key" if error.status_code == 401 else getattr(error, "code", None)
        content = body(str(error.detail), error.status_code, getattr(error, "param", None), code)
        return JSONResponse(content, error.status_code, headers=error.headers)

    async def malformed(request: Any, error: Any) -> Any:
        # where a field is wrong: ("body", "messages", 0, "role"); where it is no JSON: ("body", position)
        problems = [
            ("", p) if p["type"] == "json_invalid" else (".".join(map(str, p["loc"][1:])), p) for p in error.errors()
        ]
        text = "; ".join(f"{place or 'body'}: {problem['msg']}" for place, problem in problems)
        return JSONResponse(body(text, 400, problems[0][0] or None), 400)

    async def failed(request: Any, error: Exception) -> Any:
        return JSONResponse(body(f"{type(error).__name__}: {error}", 500), 500)

    app.add_exception_handler(AnyHTTPException, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(Exception, failed)  # Starlette raises it again for the server's log
