"""The commands of the chat in the terminal: one table, from which ``/help`` is written.

A command gets the conversation and the rest of its line, and returns what to print. A word that begins with a slash and goes on in
letters is a command or a mistake; paths, comments and texts of several lines are questions.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...apply import choose_adapter, switch_adapter
from ...ground.atomic_output import replacing
from ...ground.errors import KTConfigError, KTDataError, KTModelError, KTOutputError, KTPathError
from ...ground.streams import terminal_width
from ...model.state import KTState, has_kt_experts, kt_state
from ...settings.values import suggestion
from .generating import SETTINGS, read_setting


@dataclass
class Conversation:
    """What has been said to a model, and how it shall answer."""

    chat_model: Any
    """LLaMA-Factory's"""
    show_stats: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)
    generating: dict[str, Any] = field(default_factory=dict)
    """what ``/set`` has changed, as ``stream_chat`` takes it"""
    saved: set[Path] = field(default_factory=set)
    """files that hold this conversation, which may be written again"""
    ended: bool = False

    @property
    def model(self) -> Any:
        """None with ``infer_backend: sglang``, where the server has it."""
        return getattr(self.chat_model.engine, "model", None)

    def state(self) -> KTState:
        """Of the model with KT experts.

        Raises:
            KTModelError: It is in the server.
        """
        if not has_kt_experts(self.model):
            raise KTModelError("The model is in the server; this command needs infer_backend: huggingface.")
        return kt_state(self.model)


Run = Callable[[Conversation, str], str]
"""what does a command: gets the rest of its line, returns what to print"""


class Command(NamedTuple):
    """A row of the table."""

    run: Run
    argument: str
    """what follows it, in brackets if it may be missing; empty for nothing"""
    help: str


COMMANDS: dict[str, Command] = {}
WORDS = {"exit": "/exit", "clear": "/clear"}
"""LLaMA-Factory's own, without a slash"""


def run_command(conversation: Conversation, line: str) -> str | None:
    """Do what a line asks for; None if it is a question for the model.

    Returns:
        What to print.

    Raises:
        KTError: It cannot be done; nothing has changed.
    """
    words = WORDS.get(line.strip(), line.strip())
    if not re.fullmatch(r"/([a-zA-Z]+|\?)( .*)?", words):
        return None
    name, _, rest = words.partition(" ")
    rest = rest.strip()
    name = _ALIASES.get(name.lower(), name.lower())
    if (command := COMMANDS.get(name)) is None:
        if line.startswith(" "):
            return None
        raise KTConfigError(
            f"{name} is no command{suggestion(name, COMMANDS)} /help lists them. A question that begins so is asked with a blank before it."
        )
    if bool(rest) != bool(command.argument) and not command.argument.startswith("["):
        raise KTConfigError(f"Usage: {_usage(name)}: {command.help}")
    return command.run(conversation, rest)


_ALIASES = {"/bye": "/exit", "/quit": "/exit", "/?": "/help"}


def _usage(name: str) -> str:
    return f"{name} {COMMANDS[name].argument}".rstrip()


def _command(name: str, argument: str, help: str) -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        COMMANDS[name] = Command(run, argument, help)
        return run

    return add


@_command("/help", "", "this list")
def _help(conversation: Conversation, rest: str) -> str:
    width = max(len(_usage(name)) for name in COMMANDS)
    columns, indent = terminal_width(1000), " " * (width + 4)  # as many as there are in a pipe
    rows = [
        textwrap.fill(f"  {_usage(name):{width}}  {command.help}", columns, subsequent_indent=indent)
        for name, command in COMMANDS.items()
    ]
    keys = (
        'Ctrl-C stops an answer, Ctrl-D leaves. """ begins and ends a question of several lines; what is pasted is one.'
    )
    return "\n".join([*rows, keys])


@_command("/exit", "", "leave; /bye, exit and Ctrl-D too")
def _exit(conversation: Conversation, rest: str) -> str:
    conversation.ended = True
    return ""


@_command("/clear", "", "begin a new conversation; clear too")
def _clear(conversation: Conversation, rest: str) -> str:
    from llamafactory.extras.misc import torch_gc

    conversation.messages.clear()
    conversation.saved.clear()
    torch_gc()
    return "History has been removed."


@_command("/history", "", "show the conversation")
def _history(conversation: Conversation, rest: str) -> str:
    who = {"user": "User", "assistant": "Assistant"}
    turns = [f"{who[message['role']]}: {message['content']}" for message in conversation.messages]
    return "\n".join(turns) or "Nothing has been said."


@_command("/save", "FILE", "write the conversation as JSON, in the sharegpt form of LLaMA-Factory's data sets")
def _save(conversation: Conversation, rest: str) -> str:
    path = Path(rest).expanduser()
    if not conversation.messages:
        raise KTDataError("Nothing has been said that could be saved.")
    if path.exists() and path.resolve() not in conversation.saved:
        raise KTOutputError(f"{path} exists; choose another name.")
    sides = {"user": "human", "assistant": "gpt"}
    turns = [{"from": sides[message["role"]], "value": message["content"]} for message in conversation.messages]
    row: dict[str, Any] = {"conversations": turns}
    if system := _system(conversation):
        row["system"] = system
    with replacing(path) as file:
        file.write_text(json.dumps([row], ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    conversation.saved.add(path.resolve())
    return f"{path}: {len(turns) // 2} questions and answers."


@_command("/set", "[KEY VALUE]", "how the model answers: temperature, max_new_tokens ...; alone, what is set")
def _set(conversation: Conversation, rest: str) -> str:
    name, _, text = rest.partition(" ")
    if not name:
        return "\n".join(f"  {name} {json.dumps(_value(conversation, name), ensure_ascii=False)}" for name in SETTINGS)
    value = read_setting(name, text.strip())
    conversation.generating[name] = value
    idle = name in ("temperature", "top_p", "top_k") and not _value(conversation, "do_sample")
    return f"{name} {json.dumps(value, ensure_ascii=False)}" + (
        "; it has no effect before /set do_sample true" if idle else ""
    )


def _value(conversation: Conversation, name: str) -> Any:
    if name == "system":
        return _system(conversation)
    return conversation.generating.get(name, conversation.chat_model.engine.generating_args.get(name))


def _system(conversation: Conversation) -> str:
    """The system prompt: what was set, or the template's own, as LLaMA-Factory chooses it."""
    return str(conversation.generating.get("system") or conversation.chat_model.engine.template.default_system)


@_command("/adapter", "", "what is applied to the model, and what else kt_adapters names")
def _adapter(conversation: Conversation, rest: str) -> str:
    state = conversation.state()
    report, there = state.report, [name for name in state.choices if state.is_in_place(state.choices[name])]
    applied = f"{report.adapter}: LoRA tensors {report}." if report else "No adapter: this is the base model."
    applied = f"{there[0]}: {applied}" if there else applied
    return f"{applied}\n/load chooses among {', '.join(state.choices)}." if state.choices else applied


@_command(
    "/load",
    "ADAPTER",
    "apply another adapter: a name in kt_adapters, a directory, or several with commas between; the conversation stays",
)
def _load(conversation: Conversation, rest: str) -> str:
    choices = conversation.state().choices
    if rest in choices:
        choose_adapter(conversation.model, rest)
        return _adapter(conversation, "")
    paths = [Path(name.strip()).expanduser() for name in rest.split(",")]
    if choices and len(paths) == 1 and not paths[0].exists():
        raise KTPathError(f"{rest} is no directory, and no name in kt_adapters{suggestion(rest, choices)}")
    return _switch(conversation, paths)


@_command("/unload", "", "take the adapter away")
def _unload(conversation: Conversation, rest: str) -> str:
    return _switch(conversation, None)


def _switch(conversation: Conversation, adapters: list[Path] | None) -> str:
    switch_adapter(conversation.model, adapters, conversation.state().lora_scope)
    return _adapter(conversation, "")


@_command("/stats", "", "switch the figures after each answer on or off")
def _stats(conversation: Conversation, rest: str) -> str:
    conversation.show_stats = not conversation.show_stats
    return f"Figures after each answer: {'on' if conversation.show_stats else 'off'}."


@_command("/experts", "", "which experts the answers used (kt_router_stats: true)")
def _experts(conversation: Conversation, rest: str) -> str:
    from ...router_stats.stats import get_router_stats, router_table

    conversation.state()
    if not counts_experts(conversation.model):
        raise KTModelError("Experts are not counted: set kt_router_stats: true in the YAML, and start again.")
    return router_table(get_router_stats(conversation.model))


def counts_experts(model: Any) -> bool:
    """Whether ``/experts`` has something to show."""
    return has_kt_experts(model) and kt_state(model).wrappers[0].router_counts is not None
