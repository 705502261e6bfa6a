"""Prompts in LLaMA-Factory's message forms, each line on its own: one that is malformed does not stop the others.

The rows are converted by LLaMA-Factory's own dataset converters (``llamafactory/data/converter.py``); a conversation may
end with the user's turn, which their training data may not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ground.errors import KTDataError, KTPathError

_MEDIA = ("images", "videos", "audios")
_OPENAI = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "system_tag": "system", "observation_tag": "tool", "function_tag": "function_call",
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One row of a file of prompts."""

    index: int
    """position in the file, from 0; blank lines are not counted"""
    row: Mapping[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    """up to the turn that is to be answered, in LLaMA-Factory's form"""
    system: str = ""
    tools: str = ""
    reference: str = ""
    """the answer that the row has, if any"""
    problem: str = ""
    """why the row cannot be used"""

    @property
    def text(self) -> str:
        """The last turn, to show."""
        return self.messages[-1]["content"] if self.messages else ""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a ``.jsonl`` file (a row a line) or a ``.json`` file (a list of rows).

    A row has ``instruction`` (or ``prompt``) with ``input``, ``output``, ``history`` and ``system``: alpaca; or
    ``conversations`` or ``messages``, of ``from`` and ``value``: sharegpt; of ``role`` and ``content``: openai.

    Raises:
        KTPathError: There is no such file.
        KTDataError: It holds no prompts, or is JSON that is no list.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise KTPathError(f"{path}: the file of prompts does not exist.")
    text = path.read_text(encoding="utf-8-sig")
    rows: list[Any]
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise KTDataError(f"{path} is not valid JSON: {error}. For a row a line, name it .jsonl.") from error
        if not isinstance(rows, list):
            raise KTDataError(f"{path} must be a list of rows, found {type(rows).__name__}.")
    else:
        rows = [line for line in text.split("\n") if line.strip()]
    if not rows:
        raise KTDataError(f"{path} holds no prompts.")
    return [_parse(index, row) if path.suffix != ".json" else convert(index, row) for index, row in enumerate(rows)]


def make_prompts(prompts: Iterable[Any]) -> list[Prompt]:
    """Prompts of a program: texts, lists of messages, or rows as :func:`read_prompts` takes them.

    Raises:
        KTDataError: One of them cannot be used.
    """
    made = []
    for index, prompt in enumerate(prompts):
        row = {"instruction": prompt} if isinstance(prompt, str) else prompt
        made.append(convert(index, {"messages": row} if isinstance(row, list) else row))
        if made[-1].problem:
            raise KTDataError(f"prompt {index}: {made[-1].problem}")
    return made


def _parse(index: int, line: str) -> Prompt:
    try:
        return convert(index, json.loads(line))
    except ValueError as error:
        return Prompt(index, problem=f"not valid JSON: {error}")


def convert(index: int, row: Any) -> Prompt:
    """One row; what is wrong with it is in ``problem``."""
    if not isinstance(row, dict):
        return Prompt(index, problem=f"a row must be a dictionary, found {type(row).__name__}")
    if media := [name for name in _MEDIA if row.get(name)]:
        return Prompt(index, row, problem=f"{', '.join(media)}: only text is supported")
    try:
        aligned = _align(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Prompt(index, row, problem=str(error) if isinstance(error, KTDataError) else f"malformed: {error!r}")
    response = aligned["_response"]
    return Prompt(
        index, row, aligned["_prompt"], aligned["_system"] or "", aligned["_tools"] or "",
        reference=response[0]["content"] if response else "",
    )  # fmt: skip


def _align(row: dict[str, Any]) -> dict[str, Any]:
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr

    attributes = DatasetAttr("file", dataset_name="prompts")
    attributes.system, attributes.tools = ("system" if "system" in row else None), ("tools" if "tools" in row else None)
    column = next((name for name in ("messages", "conversations") if name in row), None)
    if column is None:
        attributes.prompt = "instruction" if "instruction" in row else "prompt"
        if not isinstance(row.get(attributes.prompt), str):
            raise KTDataError(
                f"expected instruction, prompt, messages or conversations, found {', '.join(map(str, row)) or 'nothing'}"
            )
        attributes.history = "history"
        for name in ("query", "response", "history"):
            if getattr(attributes, name) not in row:
                setattr(attributes, name, None)
        aligned: dict[str, Any] = get_dataset_converter("alpaca", attributes, None)(row)
    else:
        messages = row[column]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise KTDataError(f"{column} must be a list of messages that is not empty")
        if "role" in messages[0]:
            for name, value in _OPENAI.items():
                setattr(attributes, name, value)
        role, content = attributes.role_tag, attributes.content_tag
        if wrong := [m for m in messages if not isinstance(m.get(role), str) or not isinstance(m.get(content), str)]:
            raise KTDataError(f"a message needs the texts {role} and {content}, found {json.dumps(wrong[0])[:200]}")
        if messages[-1][role] in (attributes.user_tag, attributes.observation_tag):  # nothing to train on
            messages = [*messages, {role: attributes.assistant_tag, content: ""}]
        attributes.messages = column
        aligned = get_dataset_converter("sharegpt", attributes, None)({**row, column: messages})
    if not aligned["_prompt"]:
        raise KTDataError("turns must alternate between user and assistant, and start with the user")
    return aligned
