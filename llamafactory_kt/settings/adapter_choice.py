"""``kt_adapters``: adapters among which requests and commands choose, by names that the configuration gives them."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engines.registry import backend_names, find_engine

EXAMPLE = "{one: /saves/one, two: /saves/two}"
Choices = dict[str, list[str]]
"""name -> the adapters that it stands for, which add up; none: the model alone"""

_NAME = re.compile(r"[^\W_](?:[\w./@+-]*\w)?")


def model_name(path: str) -> str:
    """What requests call the model: ``API_MODEL_NAME``, LLaMA-Factory's variable, or the name of the checkpoint's directory.

    Args:
        path: the checkpoint's directory, or its name on the hub.
    """
    return os.environ.get("API_MODEL_NAME") or Path(path).name or path


def read_choices(value: Any) -> tuple[Choices, list[str]]:
    """The choices that ``kt_adapters`` says, and what is wrong with it.

    Args:
        value: a dictionary, or one in JSON as on a command line.

    >>> read_choices({"one": "/saves/one", "sum": "/saves/one, /saves/two", "plain": None})
    ({'one': ['/saves/one'], 'sum': ['/saves/one', '/saves/two'], 'plain': []}, [])
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # said below
            value = json.loads(value)
    if not isinstance(value, Mapping | None):
        return {}, [f"kt_adapters must be a dictionary of names and adapters, such as {EXAMPLE}, found {value!r}."]
    choices: Choices = {}
    problems = []
    for name, adapters in (value or {}).items():
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            problems.append(
                f"kt_adapters: {name!r} is no name; it needs letters, digits and . _ - / @ + between them (in quotes, if it is a number)."
            )
            continue
        paths = adapters.split(",") if isinstance(adapters, str) else [] if adapters is None else adapters
        if not isinstance(paths, list) or not all(isinstance(path, str) and path.strip() for path in paths):
            problems.append(
                f"kt_adapters: {name} must be an adapter's directory, several, or nothing for the model alone; found {adapters!r}."
            )
            continue
        choices[name] = [path.strip() for path in paths]
    return choices, problems


def choice_problems(args: Any) -> list[str]:
    """What else of a configuration does not go with its ``kt_adapters``, which have been read."""
    if not args.kt_adapters:
        return []
    problems, engine = [], find_engine(args.kt_backend) if args.kt_backend in backend_names() else None
    if (own := model_name(str(args.model_name_or_path))) in args.kt_adapters:
        problems.append(
            f"kt_adapters: {own} is the model's own name, which stands for adapter_name_or_path; choose another, or set API_MODEL_NAME."
        )
    if args.kt_merge_adapter or (engine is not None and not engine.computes_lora):
        reason = "kt_merge_adapter: true" if args.kt_merge_adapter else f"kt_backend: {args.kt_backend}"
        problems.append(
            f"kt_adapters: adapters that take turns stay apart from the weights, but {reason} merges one into them; keep one of the two."
        )
    return problems
