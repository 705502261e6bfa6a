"""A question that is typed or pasted into a terminal, with editing and history; in a pipe, a line is a question."""

from __future__ import annotations

import contextlib
import sys

_FENCE = '"""'
"""opens a question of several lines, and closes it"""


def edit_lines() -> None:
    """Let ``input`` edit lines, recall earlier ones, and take what is pasted as one question."""
    with contextlib.suppress(ImportError):
        import readline

        for setting in (
            "input-meta on", "output-meta on", "convert-meta off",  # bytes above 127 are text
            "enable-bracketed-paste on",  # which Python switches off
        ):  # fmt: skip
            readline.parse_and_bind(f"set {setting}")


def read_question(prompt: str) -> str:
    """The next question, or command. In a terminal it may have several lines, and is empty only if there was no text.

    Raises:
        EOFError: There is none; Ctrl-D.
        KeyboardInterrupt: Ctrl-C.
        UnicodeDecodeError: Bytes that are no text, where the stream does not replace them.
    """
    text = input(prompt)
    if not sys.stdin.isatty():
        return text
    text = text.rstrip("\n") if text.strip() else ""
    if "\n" in text or not text.lstrip().startswith(_FENCE):  # what was pasted is as it is
        return text
    lines = [text.lstrip().removeprefix(_FENCE)]
    while not lines[-1].rstrip().endswith(_FENCE):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(_FENCE)
    return "\n".join(lines).strip("\n")
