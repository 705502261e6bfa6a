"""Messages of a conversation, and the parts of their contents."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .base import LIST, Strict
from .tools import Function, ToolCall


class Address(Strict):
    """Where a picture, video or sound is: a web address or a data URL."""

    url: str
    detail: str | None = None


class Text(Strict):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str | None = None


class ImageUrl(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: Address | None = None


class VideoUrl(Strict):
    """A video; LLaMA-Factory's own extension."""

    type: Literal["video_url"]
    video_url: Address | None = None


class AudioUrl(Strict):
    """A sound; LLaMA-Factory's own extension."""

    type: Literal["audio_url"]
    audio_url: Address | None = None


class Sound(Strict):
    """A file in Base64."""

    data: str
    format: Literal["wav", "mp3"]


class InputAudio(Strict):
    """A sound, as OpenAI's API has it."""

    type: Literal["input_audio"]
    input_audio: Sound

    def as_address(self) -> AudioUrl:
        """The same as a data URL."""
        url = f"data:audio/{self.input_audio.format};base64,{self.input_audio.data}"
        return AudioUrl(type="audio_url", audio_url=Address(url=url))


class Refusal(Strict):
    """What another server's model said in place of an answer."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[Text | ImageUrl | VideoUrl | AudioUrl | InputAudio | Refusal, Field(discriminator="type")]


class Message(Strict):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], LIST] | None = None
    refusal: str | None = None
    """in place of the content of an assistant's message"""
    tool_calls: Annotated[list[ToolCall], LIST] | None = None
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
