"""JSON files that others wrote: objects alone, of a bounded size, and no key twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import KTError, first_line, name_some

LARGEST = 64 * 2**20
"""bytes of a JSON file that is read"""


def read_json_object(path: Path, error: type[KTError]) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        error: what to raise.

    Raises:
        KTError: Of the type ``error``: there is no such file, it is a directory, a pipe or too large, or it does not hold one JSON object.
    """
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "is missing"
        raise error(f"{path} {what}.")
    if (size := path.stat().st_size) > LARGEST:
        raise error(f"{path} has {size:,} bytes; a file of settings has at most {LARGEST:,}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}.") from reason
    except (ValueError, RecursionError) as reason:  # an integer of thousands of digits is a ValueError, too
        why = "it is nested too deeply" if isinstance(reason, RecursionError) else first_line(reason)
        raise error(f"{path} is not valid JSON: {why}.") from reason
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object, found {type(content).__name__}.")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return found


def problems(error: ValidationError) -> str:
    """What is wrong with an object's values, each with its key and what was found."""
    wrong = []
    for problem in error.errors(include_url=False, include_context=False):
        place = [str(part) for part in problem["loc"] if not str(part).startswith(("list[", "dict[", "literal["))]
        wrong.append(f"{'.'.join(place[:3])}: {problem['msg'].removeprefix('Input ')}, found {problem['input']!r:.80}")
    return name_some(dict.fromkeys(wrong), 4)
