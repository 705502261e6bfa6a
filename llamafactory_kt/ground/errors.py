"""The errors that llamafactory_kt raises. Each is also a built-in exception, so existing handlers keep working."""

from __future__ import annotations

import os
from collections.abc import Iterable

_LONGEST = 4_000
"""characters of one message or name"""


class KTError(Exception):
    """Base of all errors raised by llamafactory_kt. Names and values from files, which messages quote, cannot move a terminal's cursor."""

    def __init__(self, *args: object):
        super().__init__(*("\n".join(map(printable, str(arg).split("\n"))) for arg in args))


class KTConfigError(KTError, ValueError):
    """One or several kt_* keys, or a combination of them, are wrong."""


class KTPathError(KTError, FileNotFoundError):
    """A model or adapter path does not exist."""

    def __str__(self) -> str:  # FileNotFoundError would print the arguments' tuple
        return str(self.args[0]) if self.args else ""


class KTModelError(KTError, ValueError):
    """The checkpoint or its architecture cannot be served."""


class KTAdapterError(KTError, ValueError):
    """The adapter is broken, or made for another model."""


class KTOutputError(KTError, OSError):
    """An output could not be written: the disk is full, a file larger than allowed, a directory protected."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class KTDataError(KTError, ValueError):
    """A file of prompts or answers, or a line of it, cannot be used."""


class KTKernelError(KTError, RuntimeError):
    """kt-kernel is missing or has no kernel for this CPU."""


class KTMemoryError(KTError, MemoryError):
    """The experts do not fit into the memory that is free."""


class KTServerError(KTError, RuntimeError):
    """SGLang is missing or has no KT, or its server did not start or answer."""


class KTHookError(KTError, RuntimeError):
    """A function of LLaMA-Factory is not the expected one, so it cannot be hooked."""


def name_some(names: Iterable[object], limit: int = 5) -> str:
    """The first names of a list that may be long.

    >>> name_some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    items = [str(name) for name in names]
    shown = ", ".join(items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def ranges(numbers: Iterable[int]) -> str:
    """``1-26`` for a run of numbers, ``1, 3-5`` for several.

    >>> ranges([1, 3, 4, 5])
    '1, 3-5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or the name of its type if it has no message.

    >>> one_line(OSError("libtorch.so:\\n undefined symbol")), one_line(KeyboardInterrupt())
    ('libtorch.so: undefined symbol', 'KeyboardInterrupt')
    """
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def describe(error: BaseException, lines: bool = False) -> str:
    """An error's type and message without line breaks. Of our own errors only the message: the type tells users nothing.

    Args:
        lines: whether lists of mistakes keep their lines.

    >>> describe(ValueError("too\\nlong")), describe(KTConfigError("kt_backend: unknown value"))
    ('ValueError: too long', 'kt_backend: unknown value')
    >>> describe(KTConfigError("Invalid:\\n  - one\\n  - two"), lines=True)
    'Invalid:\\n- one\\n- two'
    """
    if not isinstance(error, KTError):
        return f"{type(error).__name__}: {one_line(error)}"
    if lines:
        return "\n".join(" ".join(line.split()) for line in str(error).splitlines()) or one_line(error)
    return one_line(error)


def traceback_wanted() -> bool:
    """Whether commands print tracebacks instead of messages alone (``LLAMAFACTORY_KT_DEBUG``)."""
    return os.environ.get("LLAMAFACTORY_KT_DEBUG", "") not in ("", "0")


def printable(text: str, longest: int = _LONGEST) -> str:
    """The text with control characters escaped (those that move the cursor, ring the bell or start a line) and its middle cut.

    >>> printable("q_proj\\x1b[2J\\n"), printable("x" * 3000, 2000)[995:1013]
    ('q_proj\\\\x1b[2J\\\\n', 'xxxxx ... xxxxxxxx')
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )
