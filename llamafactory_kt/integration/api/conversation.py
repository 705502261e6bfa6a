"""A conversation in OpenAI's form becomes one in LLaMA-Factory's, in which somebody who asks (user, tool) and the model that answers
take turns.

OpenAI's API asks for no such turns: several messages of one side in a row become one turn, and an empty turn stands between two that
cannot be one, such as the result of a tool and a question. System messages are one, before all turns.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from .attached.attachments import Media, read_media
from .errors import BadRequest
from .protocol.chat_request import ChatRequest
from .protocol.messages import Message
from .protocol.tools import FunctionDefinition

ASKING, ANSWERING = ("user", "observation"), ("assistant", "function")
"""roles of LLaMA-Factory's ``data_utils.Role``, by side"""

Turn = tuple[str, Any]
"""a role, and a text or (``function``) what was said with the calls, and the calls"""


def read_conversation(request: ChatRequest, template: Any) -> dict[str, Any]:
    """The conversation as LLaMA-Factory's engines take it.

    Args:
        request: OpenAI's.
        template: LLaMA-Factory's, which knows how several results of tools are told apart and which tools it can write.

    Returns:
        ``messages``, ``system``, ``tools``, ``images``, ``videos`` and ``audios``.

    Raises:
        BadRequest: What is wrong with it, or with a picture, video or sound.
    """
    if not request.messages:
        raise BadRequest("Invalid length: messages is empty.", "messages")
    media = Media()
    system, turns = [], list[Turn]()
    previous = None
    for number, message in _ordered(request.messages):
        text = _text(message, number, media)
        if message.role in ("system", "developer"):
            system.append(text)
            continue
        _add(turns, _turn(message, text, previous, number), template)
        previous = message
    if not turns or turns[-1][0] in ANSWERING:
        raise BadRequest(
            "Invalid role: the last message must be the user's or a tool's, for the model to answer.", "messages"
        )
    return {
        "messages": [{"role": role, "content": _content(role, said, template)} for role, said in turns],
        "system": "\n".join(system) or None,
        "tools": _tools(request, template),
        "images": media.images or None,
        "videos": media.videos or None,
        "audios": media.audios or None,
    }


def _ordered(messages: list[Message]) -> list[tuple[int, Message]]:
    """The messages with their numbers; results of tools in the order of the calls, which is all that tells a model whose they are."""
    numbered = list(enumerate(messages))
    for number, message in numbered[:]:
        if not message.tool_calls:
            continue
        places = {call.id: place for place, call in enumerate(message.tool_calls)}
        end = number + 1
        while end < len(messages) and messages[end].role == "tool":
            end += 1
        if all(result.tool_call_id in places for result in messages[number + 1 : end]):
            numbered[number + 1 : end] = sorted(
                numbered[number + 1 : end], key=lambda result: places[result[1].tool_call_id]
            )
    return numbered


def _text(message: Message, number: int, media: Media) -> str:
    """A message's text, with LLaMA-Factory's placeholders where media are, which are read into ``media``."""
    problem = f"messages[{number}] has no content."
    if not (parts := message.parts()) and message.content is None:
        if message.role == "assistant" and message.calls():
            return ""
        raise BadRequest(problem, "messages")
    texts = []
    for part in parts:
        if part.type != "text" and message.role in ("system", "developer"):
            kind = part.type.removesuffix("_url")
            raise BadRequest(
                f"messages[{number}]: a system prompt takes text alone; put the {kind} into a message of the user.",
                "messages",
            )
        if part.type != "text":
            texts.append(read_media(part, f"messages[{number}]", media))
        elif part.text is None:
            raise BadRequest(problem, "messages")
        else:
            texts.append(part.text)
    if not texts:
        raise BadRequest(problem, "messages")
    return "".join(texts)


def _turn(message: Message, text: str, previous: Message | None, number: int) -> Turn:
    if message.role == "assistant":
        calls = [call.plain() for call in message.calls()]
        return ("function", ([text] if text else [], calls)) if calls else ("assistant", text)
    if message.role != "function":
        return ("observation" if message.role == "tool" else "user"), text
    if previous is not None and previous.calls():  # OpenAI's older form of a tool's result
        return "observation", text
    # LLaMA-Factory's: what the model called, in JSON
    try:
        loaded = json.loads(text)
        calls = [
            {"name": call["name"], "arguments": call["arguments"]}
            for call in ([loaded] if isinstance(loaded, dict) else loaded)
        ]
        if not calls or not all(
            isinstance(call["name"], str) and isinstance(call["arguments"], dict) for call in calls
        ):
            raise TypeError("no calls")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadRequest(
            f'messages[{number}]: a function message must be JSON of the calls, [{{"name": "...", "arguments": {{...}}}}], '
            "or follow the call whose result it is.",
            "messages",
        ) from error
    return "function", ([], calls)


def _add(turns: list[Turn], turn: Turn, template: Any) -> None:
    """Append a turn, or make it one with the last."""
    role, said = turn
    side = ASKING if role in ASKING else ANSWERING
    if not turns and side is ANSWERING:  # a greeting
        turns.append(("user", ""))
    if not turns or turns[-1][0] not in side:
        turns.append(turn)
        return
    last, before = turns[-1]
    if (last, role) == ("assistant", "function"):
        turns[-1] = role, ([before, *said[0]], said[1])
    elif last != role:
        turns += [("user" if side is ANSWERING else "assistant", ""), turn]
    elif role == "function":
        turns[-1] = role, (before[0] + said[0], before[1] + said[1])
    else:
        turns[-1] = role, before + (between_results(template) if role == "observation" else "\n") + said


def between_results(template: Any) -> str:
    """What stands between two results of tools: the marks that the template puts around one, or a new line.

    >>> from types import SimpleNamespace as Given
    >>> slots = ["<|im_start|>user\\n<tool_response>\\n{{content}}\\n</tool_response><|im_end|>\\n"]
    >>> between_results(Given(format_observation=Given(slots=slots)))
    '\\n</tool_response>\\n<tool_response>\\n'
    """
    for slot in template.format_observation.slots:
        if isinstance(slot, str) and (found := re.search(r"(<(\w+)>\s*)\{\{content\}\}(\s*</\2>)", slot)):
            return f"{found[3]}\n{found[1]}"
    return "\n"


def _content(role: str, said: Any, template: Any) -> str:
    if role != "function":
        return str(said)
    texts, calls = said
    # no marks of the template inside the JSON, which a template finds by them
    written = json.dumps(calls, ensure_ascii=False).replace("<", "\\u003c")
    if not texts:
        return written
    begin, end = template.tool_call_words
    return "\n".join(texts) + f"{begin}{written}{end}"


def _tools(request: ChatRequest, template: Any) -> str | None:
    """The tools in JSON, as the client describes them if the template can write that, else as every template can."""
    if not (functions := request.functions()):
        return None
    for describe in (_as_given, _simple):
        written = json.dumps([describe(function) for function in functions], ensure_ascii=False)
        with contextlib.suppress(Exception):  # templates expect one shape of a description, and check none
            template.format_tools.apply(content=written)
            return written
    raise BadRequest("The chat's template cannot describe these tools.", "tools")


def _as_given(function: FunctionDefinition) -> dict[str, Any]:
    fields = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {name: value for name, value in fields.items() if value is not None}


def _simple(function: FunctionDefinition) -> dict[str, Any]:
    """A tool of which each parameter has a type, a description and, if any, choices in text."""
    parameters = function.parameters or {}
    properties: Any = parameters.get("properties") or {}
    return {
        "name": function.name,
        "description": function.description or "",
        "parameters": {
            "type": "object",
            "properties": {name: dict(_simple_property(value)) for name, value in properties.items()},
            "required": parameters.get("required") or [],
        },
    }


def _simple_property(schema: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(schema, dict):  # true: anything
        return
    kind = schema.get("type")
    if kind:
        yield "type", kind if isinstance(kind, str) else " or ".join(kind)
    if schema.get("description"):
        yield "description", schema["description"]
    if schema.get("enum"):
        yield "enum", [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in schema["enum"]]
    if isinstance(schema.get("items"), dict):
        yield "items", dict(_simple_property(schema["items"]))
