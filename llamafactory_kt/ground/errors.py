"""The errors llamafactory_kt raises. Each is also a built-in exception, so existing handlers keep working.

KTError
├── KTConfigError(ValueError)          a kt_* key, or a combination of keys
├── KTPathError(FileNotFoundError)     a model or adapter that is not there
├── KTModelError(ValueError)           a checkpoint or architecture that cannot be served
├── KTAdapterError(ValueError)         an adapter that is broken or made for another model
├── KTDataError(ValueError)            a file of prompts or answers, or a line of it
├── KTKernelError(RuntimeError)        kt-kernel is missing or cannot run on this CPU
├── KTMemoryError(MemoryError)         not enough memory for the experts
├── KTServerError(RuntimeError)        SGLang is missing, or its server did not start or answer
└── KTHookError(RuntimeError)          this LLaMA-Factory cannot be hooked into
"""

from __future__ import annotations

import os
from collections.abc import Iterable


class KTError(Exception):
    """Base of all errors raised by llamafactory_kt."""


class KTConfigError(KTError, ValueError):
    """One or several kt_* keys are wrong."""


class KTPathError(KTError, FileNotFoundError):
    """A model or adapter path does not exist."""

    def __str__(self) -> str:  # FileNotFoundError would print the arguments' tuple
        return str(self.args[0]) if self.args else ""


class KTModelError(KTError, ValueError):
    """The checkpoint or its architecture cannot be served."""


class KTAdapterError(KTError, ValueError):
    """The adapter is broken, or made for another model."""


class KTDataError(KTError, ValueError):
    """A file of prompts or answers, or a line of it, cannot be used."""


class KTKernelError(KTError, RuntimeError):
    """kt-kernel is missing or has no kernel for this CPU."""


class KTMemoryError(KTError, MemoryError):
    """The experts do not fit into the memory that is free."""


class KTServerError(KTError, RuntimeError):
    """SGLang is missing or has no KT, or its server did not start or answer."""


class KTHookError(KTError, RuntimeError):
    """A function of LLaMA-Factory is not the one that was expected."""


def name_some(names: Iterable[object], limit: int = 5) -> str:
    """``a, b, c and 7 more``: the first names of a list that may be long.

    >>> name_some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    items = [str(name) for name in names]
    shown = ", ".join(items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks; its type where it says nothing.

    >>> one_line(OSError("libtorch.so:\\n undefined symbol")), one_line(KeyboardInterrupt())
    ('libtorch.so: undefined symbol', 'KeyboardInterrupt')
    """
    return " ".join(str(error).split()) or type(error).__name__


def describe(error: BaseException) -> str:
    """``ValueError: what it says``, without line breaks; our own errors without their type, which says nothing to users.

    >>> describe(ValueError("too\\nlong")), describe(KTConfigError("kt_backend: unknown value"))
    ('ValueError: too long', 'kt_backend: unknown value')
    """
    return one_line(error) if isinstance(error, KTError) else f"{type(error).__name__}: {one_line(error)}"


def traceback_wanted() -> bool:
    """Whether LLAMAFACTORY_KT_DEBUG asks for tracebacks where a command would print the message alone."""
    return os.environ.get("LLAMAFACTORY_KT_DEBUG", "") not in ("", "0")
