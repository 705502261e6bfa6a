"""Answers that have to follow a JSON Schema (``response_format``) or to call a tool (``tool_choice``)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from ...decoding.choosing import Matcher
from ...decoding.grammar import INSTALL, Grammars, is_installed
from ...ground.errors import KTError
from .errors import BadRequest
from .protocol.chat_request import ChatRequest
from .protocol.tools import FunctionDefinition
from .sampling import vocabulary_size

_MARK = {"llamafactory_kt": 1}


class GrammarsOfChat:
    """Makes grammars for the requests of a chat; the first one takes a second."""

    def __init__(self, engine: Any):
        self._engine, self._lock = engine, threading.Lock()
        self._grammars: Grammars | None = None

    def of(self, request: ChatRequest) -> Callable[[], Matcher] | None:
        """What makes the matchers of a request's answers; None if it asks for no form.

        Raises:
            BadRequest: It asks for what cannot be done.
        """
        schema, calls = request.schema_of_answer(), request.must_call()
        if schema is None and not calls:
            return None
        name = "tool_choice" if calls else "response_format"
        if schema is not None and request.functions():
            raise BadRequest(
                "response_format: not together with tools, which have a form of their own.", "response_format"
            )
        if not is_installed():
            raise BadRequest(f"{name} needs llguidance in the server's environment: {INSTALL}", name)
        try:
            if schema is not None:
                return self._all().json_schema(schema)
            return self._all().calls(self._forms(request))
        except KTError as error:
            raise BadRequest(f"{name}: {error}", name) from error

    def _all(self) -> Grammars:
        with self._lock:
            if self._grammars is None:
                tokenizer = self._engine.tokenizer
                ends = self._engine.template.get_stop_token_ids(tokenizer)
                self._grammars = Grammars(tokenizer, vocabulary_size(self._engine), list(ends))
            return self._grammars

    def _forms(self, request: ChatRequest) -> list[tuple[str, dict[str, Any], str]]:
        if not (functions := request.functions()):
            raise BadRequest("tool_choice: there are no tools to choose from.", "tool_choice")
        return [_form(function, self._engine.template) for function in functions]


def _form(function: FunctionDefinition, template: Any) -> tuple[str, dict[str, Any], str]:
    """How a call is written in a chat: what comes before the arguments, their JSON Schema, and what comes after them.

    Raises:
        BadRequest: The template writes calls without JSON.
    """
    from llamafactory.data.tool_utils import FunctionCall

    arguments = json.dumps(_MARK)
    try:
        written = template.format_function.tool_utils.function_formatter([FunctionCall(function.name, arguments)])
        before, between, after = written.partition(arguments)
        read = template.extract_tool(f"{before}{json.dumps({'a': 1})}{after}")
        works = bool(between) and [(call.name, json.loads(call.arguments)) for call in read] == [
            (function.name, {"a": 1})
        ]
    except Exception:  # templates' parsers fail in many ways
        works = False
    if not works:
        raise BadRequest(
            "tool_choice: this chat's template writes calls in a form of its own, to which answers cannot be held; "
            "leave it out, or write auto.",
            "tool_choice",
        )
    return before, {"type": "object", **(function.parameters or {})}, after
