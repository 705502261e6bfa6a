"""A request to ``/v1/chat/completions``, as OpenAI's API has it: the fields that LLaMA-Factory knows, with OpenAI's types.

LLaMA-Factory's own models (``api/protocol.py``) refuse what OpenAI's API takes, such as ``null`` for a default, and take what it
refuses, such as a tool without a function, which then fails inside. Unknown fields of a request are refused; those of a message are not
looked at, since clients send back what other servers have answered.

https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from .sampling import Sampled


class _Model(BaseModel):
    model_config = ConfigDict(strict=True)


def _named(name: str) -> str:
    if not name.isprintable():
        raise ValueError("control characters in a name")
    return name


MOST_ITEMS, LONGEST_SCHEMA = 2**16, 2**20
"""of a list; and characters of a JSON Schema"""
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


def _as_json(schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if len(json.dumps(schema, allow_nan=False)) > LONGEST_SCHEMA:
        raise ValueError(f"a schema with more than {LONGEST_SCHEMA} characters")
    return schema


def _as_schema(parameters: dict[str, JsonValue]) -> dict[str, JsonValue]:
    Schema.model_validate(_as_json(parameters))
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


class AllowedTools(_Model):
    """Some of the tools, and whether one of them shall be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolChoice], _LIST]


class AllowedToolsChoice(_Model):
    """Hides all other tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(_Model):
    """The schema of an answer; it is followed, whatever ``strict`` says."""

    name: Name | None = None
    description: str | None = None
    schema_: Annotated[dict[str, JsonValue], AfterValidator(_as_json)] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Model):
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


class Sound(_Model):
    """A file in Base64."""

    data: str
    format: Literal["wav", "mp3"]


class InputAudio(_Model):
    """A sound, as OpenAI's API has it."""

    type: Literal["input_audio"]
    input_audio: Sound

    def as_address(self) -> AudioUrl:
        """The same as a data URL."""
        url = f"data:audio/{self.input_audio.format};base64,{self.input_audio.data}"
        return AudioUrl(type="audio_url", audio_url=Address(url=url))


class Refusal(_Model):
    """What another server's model said in place of an answer."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[Text | ImageUrl | VideoUrl | AudioUrl | InputAudio | Refusal, Field(discriminator="type")]


class Message(_Model):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], _LIST] | None = None
    refusal: str | None = None
    """in place of the content of an assistant's message"""
    tool_calls: Annotated[list[ToolCall], _LIST] | None = None
    tool_call_id: str | None = None
    """the call whose result a tool's message is"""
    function_call: Function | None = None
    """OpenAI's older form of a single call"""

    def calls(self) -> list[Function]:
        """The calls that an assistant's message makes."""
        called = [call.function for call in self.tool_calls or ()]
        return called + ([self.function_call] if self.function_call else [])

    def parts(self) -> list[Any]:
        """The content as a list of parts: texts, and media with their addresses."""
        content = self.refusal if self.content is None and self.role == "assistant" else self.content
        return [
            _plain(part) for part in ([Text(type="text", text=content)] if isinstance(content, str) else content or ())
        ]


def _plain(part: Any) -> Any:
    if isinstance(part, Refusal):
        return Text(type="text", text=part.refusal)
    return part.as_address() if isinstance(part, InputAudio) else part


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

    messages: Annotated[list[Message], _LIST]
    tools: Annotated[list[Tool], _LIST] | None = None
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
