"""Tools: what the model may call, what it shall call, and calls that it has made."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, JsonValue, model_validator

from .base import LIST, Name, Strict

LONGEST_SCHEMA = 2**20
"""characters"""


class Schema(Strict):
    """What templates read of a JSON Schema. It is checked only; the prompt gets the client's own."""

    type: str | list[str] | None = None
    description: str | None = None
    properties: dict[str, Schema | bool] | None = None
    required: list[str] | None = None
    enum: list[JsonValue] | None = None
    items: Schema | bool | list[Schema | bool] | None = None


def as_json(schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """The schema; ValueError if it is too long, or has numbers that JSON has not."""
    if len(json.dumps(schema, allow_nan=False)) > LONGEST_SCHEMA:
        raise ValueError(f"a schema with more than {LONGEST_SCHEMA} characters")
    return schema


def _as_schema(parameters: dict[str, JsonValue]) -> dict[str, JsonValue]:
    Schema.model_validate(as_json(parameters))
    return parameters


class FunctionDefinition(Strict):
    """What the model may call."""

    name: Name
    description: str | None = None
    parameters: Annotated[dict[str, JsonValue], AfterValidator(_as_schema)] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function; OpenAI's API has no other tools here."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class Function(Strict):
    """A call that the model has made."""

    name: Name
    arguments: str
    """JSON"""

    @model_validator(mode="after")
    def _has_arguments(self) -> Function:
        try:
            read = json.loads(self.arguments or "{}")
            json.dumps(read, ensure_ascii=False).encode()  # not for half of a surrogate pair
        except (ValueError, RecursionError):
            read = None
        if not isinstance(read, dict):
            raise ValueError(f"the arguments of the tool call {self.name} are not a JSON object")
        return self

    def plain(self) -> dict[str, Any]:
        """As LLaMA-Factory's datasets have it: the arguments are an object, not JSON in a string."""
        return {"name": self.name, "arguments": json.loads(self.arguments or "{}")}


class ToolCall(Strict):
    """A call with its id."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class FunctionName(Strict):
    """Which function to call."""

    name: Name


class ToolChoice(Strict):
    """The one tool that the model shall call."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    """Some of the tools, and whether one of them shall be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolChoice], LIST]


class AllowedToolsChoice(Strict):
    """Hides all other tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools
