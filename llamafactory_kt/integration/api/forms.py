"""The two forms of an answer in OpenAI's API: a message of a chat, and a text that goes on."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from ...decoding.choosing import Chosen
from .protocol.tools import Function

Tokens = Sequence[tuple[int, Chosen, dict[str, Any]]]
"""of :meth:`TokensOfText.take`"""
Calls = Sequence[dict[str, Any]]
"""of tools, as the API has them"""


class Form(Protocol):
    """What stands in a choice."""

    prefix: str
    """of ids"""
    whole_object: str
    chunk_object: str
    holds: bool
    """whether a stream has an answer in one piece"""

    def read(self, text: str) -> tuple[str | None, Calls]:
        """What the model said, or which tools it calls."""

    def whole(self, text: str | None, calls: Calls) -> dict[str, Any]:
        """Of a whole answer."""

    def opening(self) -> dict[str, Any]:
        """Of the first chunk; nothing: there is none."""

    def delta(self, text: str | None, calls: Calls = ()) -> dict[str, Any]:
        """Of a chunk."""

    def ending(self) -> dict[str, Any]:
        """Of the last chunk."""

    def logprobs(self, tokens: Tokens | None) -> dict[str, Any]:
        """Of both, for the tokens of the text; None if they are not asked for."""


class ChatForm:
    """``/v1/chat/completions``.

    Args:
        template: of the chat, which finds the calls of tools.
        has_tools: whether the model knows of any.
        one_call: whether the first call of several is the only one that counts.
    """

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, template: Any, has_tools: bool, one_call: bool):
        self._template, self.holds, self._most = template, has_tools, 1 if one_call else None

    def read(self, text: str) -> tuple[str | None, Calls]:
        """What the model said, or which tools it calls."""
        if not self.holds:
            return text, []
        try:
            found = self._template.extract_tool(text)
            calls = found[: self._most] if isinstance(found, list) else []
            for call in calls:
                Function(name=call.name, arguments=call.arguments)  # else the client could not send it back
        except Exception:  # what a model writes may be almost a call, at which templates' parsers fail
            calls = []
        return (None if calls else text), [
            {
                "id": f"call_{uuid.uuid4().hex}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]

    def whole(self, text: str | None, calls: Calls) -> dict[str, Any]:
        """The message."""
        return {"message": {"role": "assistant", "content": text, "tool_calls": list(calls) or None}}

    def opening(self) -> dict[str, Any]:
        """The role."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str | None, calls: Calls = ()) -> dict[str, Any]:
        """Clients put the pieces of a call together by its index."""
        numbered = [{"index": number, **call} for number, call in enumerate(calls)]
        return {"delta": {"tool_calls": numbered} if numbered else {"content": text}}

    def ending(self) -> dict[str, Any]:
        """Nothing more."""
        return {"delta": {}}

    def logprobs(self, tokens: Tokens | None) -> dict[str, Any]:
        """Null where a chunk has no token."""
        if tokens is None:
            return {}
        content = [described for _, _, described in tokens]
        return {"logprobs": {"content": content, "refusal": None} if content else None}


class TextForm:
    """``/v1/completions``."""

    prefix, whole_object, chunk_object, holds = "cmpl", "text_completion", "text_completion", False

    def read(self, text: str) -> tuple[str | None, Calls]:
        """The text."""
        return text, []

    def whole(self, text: str | None, calls: Calls) -> dict[str, Any]:
        """The text."""
        return {"text": text}

    def opening(self) -> dict[str, Any]:
        """There is none."""
        return {}

    def delta(self, text: str | None, calls: Calls = ()) -> dict[str, Any]:
        """A piece of the text."""
        return {"text": text}

    def ending(self) -> dict[str, Any]:
        """Nothing more."""
        return {"text": ""}

    def logprobs(self, tokens: Tokens | None) -> dict[str, Any]:
        """OpenAI's older form, of lists."""
        if not tokens:
            return {"logprobs": None}
        return {
            "logprobs": {
                "text_offset": [offset for offset, _, _ in tokens],
                "tokens": [token["token"] for _, _, token in tokens],
                "token_logprobs": [token["logprob"] for _, _, token in tokens],
                "top_logprobs": [
                    {other["token"]: other["logprob"] for other in token["top_logprobs"]} for _, _, token in tokens
                ],
            }
        }
