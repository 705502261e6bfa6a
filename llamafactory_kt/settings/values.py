"""How a ``kt_*`` key is declared, and the check of its value against its annotation."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import field
from difflib import get_close_matches
from typing import Any

_MAY_BE_ZERO = ("kt_num_gpu_experts", "kt_max_deferred_experts_per_token")


def key(default: Any, help: str) -> Any:
    """A dataclass field. transformers' ``HfArgumentParser`` passes the metadata to argparse, so it holds only the help text."""
    return field(default=default, metadata={"help": help})


def type_problems(args: Any, declared_in: type) -> list[str]:
    """A sentence for each key of one class whose value does not have the annotated type. Of ``str``, only paths are checked.

    Args:
        args: the object that holds the values.
        declared_in: the dataclass with the annotations; inherited keys are left out.
    """
    problems = []
    for name, annotation in inspect.get_annotations(declared_in).items():
        kind, value = annotation.split(" | ")[0], getattr(args, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None and annotation.endswith("| None"):
            continue
        if kind == "bool":
            valid, wanted = isinstance(value, bool), "true or false"
        elif kind == "int" and name in _MAY_BE_ZERO:
            valid, wanted = number and isinstance(value, int) and value >= 0, "a whole number of at least 0"
        elif kind == "int":
            valid, wanted = number and isinstance(value, int) and value > 0, "a positive whole number"
        elif name == "kt_gpu_experts_ratio":
            valid, wanted = number and 0 <= value <= 1, "a number of at least 0 and at most 1"
        elif kind == "float":
            valid, wanted = number and value >= 0, "a number of at least 0"
        elif name.endswith(("_path", "_dir")):
            valid, wanted = isinstance(value, str), "a path"
        else:
            continue
        if not valid:
            problems.append(f"{name} must be {wanted}, found {value!r}.")
    return problems


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word.

    >>> suggestion("BF61", ["BF16", "FP8"]), suggestion("odd", ["BF16"])
    ('; did you mean BF16?', '.')
    """
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else "."
