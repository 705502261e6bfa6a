"""What ``/set`` knows, and the check of its values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ...ground.errors import KTConfigError
from ...settings.values import suggestion


class Setting(NamedTuple):
    """One of them."""

    read: Callable[[str], Any]
    """of a text; None if it is none of these values"""
    wanted: str


def _number(kind: type, valid: Callable[[Any], bool], wanted: str) -> Setting:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            return None
        return value if math.isfinite(value) and valid(value) else None

    return Setting(read, wanted)


_SWITCH = Setting({"true": True, "on": True, "false": False, "off": False}.get, "true or false")
SETTINGS = {
    "do_sample": _SWITCH,
    "temperature": _number(float, lambda value: value >= 0, "a number of at least 0"),
    "top_p": _number(float, lambda value: 0 <= value <= 1, "a number of at least 0 and at most 1"),
    "top_k": _number(int, lambda value: value >= 0, "a whole number of at least 0"),
    "repetition_penalty": _number(float, lambda value: value > 0, "a number above 0"),
    "max_new_tokens": _number(int, lambda value: value > 0, "a positive whole number"),
    "skip_special_tokens": _SWITCH,
    "system": Setting(str, "a text"),
}
"""those of LLaMA-Factory's generating arguments that a stream can have for each answer, and the system prompt"""


def read_setting(name: str, text: str) -> Any:
    """The value, as LLaMA-Factory's ``stream_chat`` takes it.

    Raises:
        KTConfigError: There is no such setting, or it cannot have this value.
    """
    if (setting := SETTINGS.get(name)) is None:
        raise KTConfigError(f"{name} cannot be set{suggestion(name, SETTINGS)} Known: {', '.join(SETTINGS)}.")
    if (value := setting.read(text)) is None:
        raise KTConfigError(f"{name} must be {setting.wanted}, found {text!r}.")
    return value
