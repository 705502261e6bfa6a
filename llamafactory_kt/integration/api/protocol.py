"""A request to ``/v1/chat/completions``, as OpenAI's API has it: the fields that LLaMA-Factory knows, with OpenAI's types.

LLaMA-Factory's own models (``api/protocol.py``) refuse what OpenAI's API takes, such as ``null`` for a default, and take what it
refuses, such as a tool without a function, which then fails inside. Unknown fields are ignored, as LLaMA-Factory does.

https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator


class _Model(BaseModel):
    model_config = ConfigDict(strict=True)


def _named(name: str) -> str:
    if not name.isprintable():
        raise ValueError("control characters in a name")
    return name


Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_named)]


class Schema(_Model):
    """What templates read of a JSON Schema. It is checked only; the prompt gets the client's own."""

    type: str | list[str] | None = None
    description: str | None = None
    properties: dict[str, Schema | bool] | None = None
    required: list[str] | None = None
    enum: list[JsonValue] | None = None
    items: Schema | bool | list[Schema | bool] | None = None


def _as_schema(parameters: dict[str, JsonValue]) -> dict[str, JsonValue]:
    Schema.model_validate(parameters)
    return parameters


class FunctionDefinition(_Model):
    """What the model may call."""

    name: Name
    description: str | None = None
    parameters: Annotated[dict[str, JsonValue], AfterValidator(_as_schema)] | None = None
    strict: bool | None = None


class Tool(_Model):
    """A function; OpenAI's API has no other tools here."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class Function(_Model):
    """A call that the model has made."""

    name: Name
    arguments: str
    """JSON"""

    @model_validator(mode="after")
    def _has_arguments(self) -> Function:
        try:
            read = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            read = None
        if not isinstance(read, dict):
            raise ValueError(f"the arguments of the tool call {self.name} are not a JSON object")
        return self

    def plain(self) -> dict[str, Any]:
        """As LLaMA-Factory's datasets have it: the arguments are an object, not JSON in a string."""
        return {"name": self.name, "arguments": json.loads(self.arguments or "{}")}


class ToolCall(_Model):
    """A call with its id."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Address(_Model):
    """Where a picture, video or sound is: a web address or a data URL."""

    url: str
    detail: str | None = None


class Text(_Model):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str | None = None


class ImageUrl(_Model):
    """A picture."""

    type: Literal["image_url"]
    image_url: Address | None = None


class VideoUrl(_Model):
    """A video; LLaMA-Factory's own extension."""

    type: Literal["video_url"]
    video_url: Address | None = None


class AudioUrl(_Model):
    """A sound; LLaMA-Factory's own extension."""

    type: Literal["audio_url"]
    audio_url: Address | None = None


Part = Annotated[Text | ImageUrl | VideoUrl | AudioUrl, Field(discriminator="type")]


class Message(_Model):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Function | None = None
    """OpenAI's older form of a single call"""

    def calls(self) -> list[Function]:
        """The calls that an assistant's message makes."""
        called = [call.function for call in self.tool_calls or ()]
        return called + ([self.function_call] if self.function_call else [])

    def parts(self) -> list[Any]:
        """The content as a list of parts."""
        if isinstance(self.content, str):
            return [Text(type="text", text=self.content)]
        return self.content or []


class ChatRequest(_Model):
    """The body of a request."""

    model: str
    messages: list[Message]
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, JsonValue] | None = None
    """``none`` hides the tools from the model; nothing makes it call one"""
    do_sample: bool | None = None
    """LLaMA-Factory's own"""
    temperature: float | None = None
    top_p: float | None = None
    n: int = 1
    presence_penalty: float | None = None
    """for LLaMA-Factory a repetition penalty; OpenAI's 0 means none"""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    """OpenAI's newer name of ``max_tokens``"""
    stop: str | list[str] | None = None
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """A field that is ``null`` has its default."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data
