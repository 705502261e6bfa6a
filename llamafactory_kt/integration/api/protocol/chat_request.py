"""The request as a whole."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from ..sampling import Sampled
from .base import LIST, Name, Strict
from .messages import Message
from .tools import AllowedToolsChoice, FunctionDefinition, Tool, ToolChoice, as_json


class JsonSchema(Strict):
    """The schema of an answer; it is followed, whatever ``strict`` says."""

    name: Name | None = None
    description: str | None = None
    schema_: Annotated[dict[str, JsonValue], AfterValidator(as_json)] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema")
        return self

    def schema_of_answer(self) -> dict[str, Any] | None:
        """None: any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


REFUSED = {
    "audio": "answers are text",
    "function_call": "write tool_choice instead",
    "functions": "write tools instead",
    "moderation": "nothing is moderated here",
    "reasoning_effort": "the server's configuration says whether the model thinks",
    "verbosity": "no model is asked for it here",
    "web_search_options": "nothing is searched here",
}
"""OpenAI's fields that are not done here, and why"""


class ChatRequest(Sampled):
    """The body of a request."""

    source: ClassVar[str] = "messages"

    messages: Annotated[list[Message], LIST]
    tools: Annotated[list[Tool], LIST] | None = None
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[ToolChoice | AllowedToolsChoice, Field(discriminator="type")]
        | None
    ) = None
    """``none`` hides the tools from the model, and names of functions all others"""
    parallel_tool_calls: bool | None = None
    """false: of several calls, the first counts"""
    max_completion_tokens: int | None = None
    """OpenAI's newer name of ``max_tokens``"""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    # they change no answer
    modalities: list[Literal["text"]] | None = None
    prediction: JsonValue = None
    prompt_cache_key: str | None = None
    prompt_cache_options: JsonValue = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    def most_tokens(self) -> int | None:
        """The most that the answer may have."""
        return self.max_tokens or self.max_completion_tokens

    def noted(self) -> int | None:
        """How many likely tokens are reported beside each one; None: no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def asks_for(self, name: str) -> bool:
        """Whether one of :data:`NEEDS_OUR_CHOICE` is asked for."""
        if name == "tool_choice":
            return self.must_call()
        if name == "response_format":
            return self.schema_of_answer() is not None
        return super().asks_for(name)

    def must_call(self) -> bool:
        """Whether the answer has to call a tool."""
        choice = self.tool_choice
        if isinstance(choice, AllowedToolsChoice):
            return choice.allowed_tools.mode == "required"
        return choice == "required" or isinstance(choice, ToolChoice)

    def chosen_names(self) -> list[str] | None:
        """The functions that ``tool_choice`` names; None: it names none."""
        choice = self.tool_choice
        if isinstance(choice, AllowedToolsChoice):
            return [one.function.name for one in choice.allowed_tools.tools]
        return [choice.function.name] if isinstance(choice, ToolChoice) else None

    def functions(self) -> list[FunctionDefinition]:
        """What the model may call."""
        if self.tool_choice == "none":
            return []
        names = self.chosen_names()
        return [tool.function for tool in self.tools or () if names is None or tool.function.name in names]

    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON Schema that the answer follows, if any."""
        return self.response_format.schema_of_answer() if self.response_format else None
