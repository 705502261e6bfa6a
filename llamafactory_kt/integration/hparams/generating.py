"""The keys of a chat's sampling, whose values LLaMA-Factory takes as they are: a wrong one would end the first answer."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from ...ground.errors import KTConfigError

_WANTED = {bool: "true or false", int: "a whole number", float: "a number"}


def check_numbers(args: Any) -> None:
    """Refuse values of another type than their field's, all at once.

    Args:
        args: LLaMA-Factory's ``GeneratingArguments``.

    Raises:
        KTConfigError: There are some.
    """
    hints = get_type_hints(type(args))
    wrong = [
        f"{field.name} must be {_WANTED[kind]}, found {value!r}."
        for field in dataclasses.fields(args)
        if (kind := hints[field.name]) in _WANTED and not _is_a(value := getattr(args, field.name), kind)
    ]
    if wrong:
        raise KTConfigError(" ".join(wrong))


def _is_a(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return isinstance(value, bool) and kind is bool
    return isinstance(value, kind) or (kind is float and isinstance(value, int))
