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


MOST_ITEMS, MOST_STOPS, LONGEST_STOP, LONGEST_SCHEMA = 2**16, 64, 4096, 2**20
"""of a list; of stop strings; characters of one, which is looked for at every token; and of a tool's parameters in JSON"""
# one error is enough: a list of a million wrong ones would hold up the server for minutes
_LIST = Field(max_length=MOST_ITEMS, fail_fast=True)

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
    if len(json.dumps(parameters)) > LONGEST_SCHEMA:
        raise ValueError(f"parameters with more than {LONGEST_SCHEMA} characters")
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
            json.dumps(read, ensure_ascii=False).encode()  # not for half of a surrogate pair
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


class FunctionName(_Model):
    """Which function to call."""

    name: Name


class ToolChoice(_Model):
    """The one tool that the model shall call."""

    type: Literal["function"]
    function: FunctionName


class StreamOptions(_Model):
    """What else a stream has."""

    include_usage: bool | None = None


class ResponseFormat(_Model):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]


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
    content: str | Annotated[list[Part], _LIST] | None = None
    tool_calls: Annotated[list[ToolCall], _LIST] | None = None
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


Stop = Annotated[str, Field(max_length=LONGEST_STOP)]
IGNORED = ("frequency_penalty", "logit_bias", "logprobs", "response_format", "seed", "top_logprobs")
"""known to OpenAI's API alone"""


class ChatRequest(_Model):
    """The body of a request."""

    model: Annotated[str, Field(max_length=4096)]
    """anything; every chunk of a stream repeats it"""
    messages: Annotated[list[Message], _LIST]
    tools: Annotated[list[Tool], _LIST] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    """``none`` hides the tools from the model, and the name of a function all others; nothing makes it call one"""
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
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, JsonValue] | None = None
    parallel_tool_calls: bool | None = None
    # what LLaMA-Factory's engines know nothing of
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    response_format: ResponseFormat | None = None
    seed: int | None = None
    top_logprobs: int | None = None

    def ignored(self) -> list[str]:
        """The fields that ask for something that the answer will not have."""
        asked = [name for name in IGNORED if getattr(self, name)]
        if self.response_format is not None and self.response_format.type == "text":
            asked.remove("response_format")
        return [*asked, *(["tool_choice"] if self.tool_choice not in (None, "none", "auto") else [])]

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """A field that is ``null`` has its default."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data
