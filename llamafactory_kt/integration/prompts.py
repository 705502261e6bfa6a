"""Prompts in LLaMA-Factory's message forms. A malformed row does not affect the others.

LLaMA-Factory's own dataset converters (``data/converter.py`` and ``data/parser.py``) convert the rows. Unlike its
training data, a conversation may end with the user's turn.
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
    """position in the file, from 0, without blank lines"""
    row: Mapping[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    """the conversation up to the turn to answer, in LLaMA-Factory's form"""
    system: str = ""
    tools: str = ""
    reference: str = ""
    """the row's own answer, if any"""
    media: Mapping[str, list[Any]] = field(default_factory=dict)
    """``images``, ``videos`` and ``audios``, of those that the row has"""
    problem: str = ""
    """why the row cannot be used"""

    @property
    def text(self) -> str:
        """The text of the last turn."""
        return self.messages[-1]["content"] if self.messages else ""


def read_prompts(path: str | Path, media_dir: str | Path | None = None) -> list[Prompt]:
    """Read a ``.jsonl`` file (one row per line) or a ``.json`` file (a list of rows).

    A row has one of three forms. alpaca: ``instruction`` or ``prompt``, with ``input``, ``output``, ``history`` and ``system``.
    sharegpt: ``conversations`` or ``messages``, with ``from`` and ``value``. openai: the same, with ``role`` and ``content``.
    ``images``, ``videos`` and ``audios`` are paths, or lists of them; a video may also be a list of frames.

    Args:
        media_dir: where such paths begin; by default, the directory of the file.

    Raises:
        KTPathError: The file does not exist.
        KTDataError: It holds no prompts, or its JSON is not a list.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise KTPathError(f"{path}: the file of prompts does not exist.")
    folder = path.parent if media_dir is None else Path(media_dir).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise KTDataError(f"{path} is no text in UTF-8: {error}.") from error
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise KTDataError(f"{path} is not valid JSON: {error}. For one row per line, name it .jsonl.") from error
        if not isinstance(rows, list):
            raise KTDataError(f"{path} must be a list of rows, found {type(rows).__name__}.")
        prompts = [convert(index, row, folder) for index, row in enumerate(rows)]
    else:
        prompts = [_parse(index, line, folder) for index, line in enumerate(filter(str.strip, text.split("\n")))]
    if not prompts:
        raise KTDataError(f"{path} holds no prompts.")
    if all(prompt.problem for prompt in prompts):
        raise KTDataError(f"{path} holds no prompts that can be used; the first row: {prompts[0].problem}.")
    return prompts


def make_prompts(prompts: Iterable[Any]) -> list[Prompt]:
    """Prompts of a program: texts, lists of messages, or rows as in :func:`read_prompts`.

    Raises:
        KTDataError: One of them is malformed.
    """
    made = []
    for index, prompt in enumerate(prompts):
        row = {"instruction": prompt} if isinstance(prompt, str) else prompt
        made.append(convert(index, {"messages": row} if isinstance(row, list) else row))
        if made[-1].problem:
            raise KTDataError(f"prompt {index}: {made[-1].problem}")
    return made


def _parse(index: int, line: str, folder: Path) -> Prompt:
    try:
        return convert(index, json.loads(line), folder)
    except ValueError as error:
        return Prompt(index, problem=f"not valid JSON: {error}")


def convert(index: int, row: Any, folder: Path = Path()) -> Prompt:
    """Convert one row. A malformed one has its reason in ``problem``.

    Args:
        folder: where paths of media begin.
    """
    if not isinstance(row, dict):
        return Prompt(index, problem=f"a row must be a dictionary, found {type(row).__name__}")
    try:
        media = {
            name: _located(items if isinstance(items, list) else [items], folder)
            for name in _MEDIA
            if (items := row.get(name))
        }
        aligned = _align(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Prompt(index, row, problem=str(error) if isinstance(error, KTDataError) else f"malformed: {error!r}")
    response = aligned["_response"]
    return Prompt(
        index, row, aligned["_prompt"], aligned["_system"] or "", aligned["_tools"] or "",
        reference=response[0]["content"] if response else "", media=media,
    )  # fmt: skip


def _located(item: Any, folder: Path) -> Any:
    """A path as a file, in the folder or as it stands; the items of a list so; a program's pictures and bytes as they are.

    Raises:
        KTDataError: There is no such file.
    """
    if isinstance(item, list):
        return [_located(each, folder) for each in item]
    if not isinstance(item, str | Path):
        return item
    found = next((str(path) for path in (folder / item, Path(item)) if path.is_file()), None)
    if found is None:
        raise KTDataError(f"{item} is no file, neither in {folder.absolute()} nor as a path of its own")
    return found


def _align(row: dict[str, Any]) -> dict[str, Any]:
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr

    def present(name: str) -> str | None:
        return name if name in row else None

    attributes = DatasetAttr("file", dataset_name="prompts", system=present("system"), tools=present("tools"))
    column = next((name for name in ("messages", "conversations") if name in row), None)
    if column is None:
        attributes.prompt = "instruction" if "instruction" in row else "prompt"
        if not isinstance(row.get(attributes.prompt), str):
            raise KTDataError(
                f"expected instruction, prompt, messages or conversations, found {', '.join(map(str, row)) or 'nothing'}"
            )
        attributes.query, attributes.response, attributes.history = map(present, ("input", "output", "history"))
        aligned: dict[str, Any] = get_dataset_converter("alpaca", attributes, None)(row)
    else:
        messages = row[column]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise KTDataError(f"{column} must be a list of messages that is not empty")
        if "role" in messages[0]:
            vars(attributes).update(_OPENAI)
        role, content = attributes.role_tag, attributes.content_tag
        if wrong := [m for m in messages if not isinstance(m.get(role), str) or not isinstance(m.get(content), str)]:
            raise KTDataError(f"a message needs the texts {role} and {content}, found {json.dumps(wrong[0])[:200]}")
        if messages[-1][role] in (attributes.user_tag, attributes.observation_tag):  # the converter wants an answer
            messages = [*messages, {role: attributes.assistant_tag, content: ""}]
        attributes.messages = column
        aligned = get_dataset_converter("sharegpt", attributes, None)({**row, column: messages})
    if not aligned["_prompt"]:
        raise KTDataError("turns must alternate between user and assistant, and start with the user")
    return aligned
