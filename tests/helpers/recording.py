"""What a terminal shows of ``llamafactory-cli chat``: recorded in one, or put together from a pipe; and a picture of it."""

from __future__ import annotations

import io
import os
import re
from collections import defaultdict
from html import unescape
from pathlib import Path

import pexpect
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from .places import CLI

COLUMNS = 104
_PROMPT = "User: "
_STYLES = {
    r"(?<=^User: ).*": "bold white",
    r"^User:": "bold green",
    r"^Assistant:": "bold cyan",
    r"^\[(prompt|INFO).*|^Figures.*|^Ctrl-C.*|^Welcome.*": "color(247)",
}


def echoed(output: str, questions: list[str]) -> str:
    """A pipe's output with the questions, which a terminal shows after each prompt."""
    before, *turns = output.split(_PROMPT)
    asked = zip([*questions, ""], turns, strict=True)
    return before + "".join(f"{_PROMPT}{question}\n{turn}" for question, turn in asked)


def recorded(config: Path, questions: list[str]) -> str:
    """What a terminal shows of a chat that is asked these questions."""
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("LLAMAFACTORY_VERBOSITY", None)
    text, size = io.StringIO(), (50, COLUMNS)
    command = ["chat", config.name]
    chat = pexpect.spawn(
        str(CLI), command, cwd=str(config.parent), env=environment, encoding="utf-8", timeout=300, dimensions=size
    )
    chat.logfile_read = text
    chat.expect(_PROMPT)
    for question in questions:
        chat.sendline(question)
        chat.expect(_PROMPT)
    chat.sendeof()
    chat.expect(pexpect.EOF)
    lines = re.sub(r"\x1b\[\?2004[hl]", "", text.getvalue()).split("\n")
    return "\n".join(map(_last_written, lines))


def _last_written(line: str) -> str:
    """A terminal's line after all that has been written over it.

    >>> _last_written("reading 0 of 18" + "\\b" * 7 + "Hello! \\r")
    'reading Hello!'
    """
    shown: list[str] = []
    column = 0
    for character in line:
        if character in "\b\r":
            column = max(column - 1, 0) if character == "\b" else 0
        else:
            shown[column : column + 1] = [character]
            column += 1
    return "".join(shown).rstrip()


def picture(session: str, title: str) -> str:
    """An SVG of it, which needs no fonts from the network."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in session.splitlines():
        text = Text(line)
        for pattern, style in _STYLES.items():
            text.highlight_regex(pattern, style)
        console.print(text, overflow="fold")
    form = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.S)
    form = form.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace")
    svg = console.export_svg(title=title, theme=MONOKAI, code_format=form, unique_id="chat")
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"


def text_of(svg: str) -> str:
    """The lines of text in a picture, without blanks."""
    lines: dict[float, str] = defaultdict(str)
    for height, text in re.findall(r'<text class="chat-r\d+" [^>]*?y="([\d.]+)"[^>]*>(.*?)</text>', svg):
        lines[float(height)] += unescape(text)
    return "\n".join(re.sub(r"\s", "", lines[height]) for height in sorted(lines))
