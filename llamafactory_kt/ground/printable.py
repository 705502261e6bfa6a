"""Text from files that others wrote, as a terminal and a log can take it."""

from __future__ import annotations

LONGEST = 4_000
"""characters of one message or name"""


def printable(text: str, longest: int = LONGEST) -> str:
    """The text with control characters escaped (those that move the cursor, ring the bell or start a line) and its middle cut.

    >>> printable("q_proj\\x1b[2J\\n"), printable("x" * 3000, 2000)[995:1013]
    ('q_proj\\\\x1b[2J\\\\n', 'xxxxx ... xxxxxxxx')
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )
