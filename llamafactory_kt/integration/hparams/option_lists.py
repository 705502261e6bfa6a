"""LLaMA-Factory's lists of options can always be built, whatever else is installed.

``HfArgumentParser`` takes a list of dataclasses, and argparse refuses an option that two of them have. LLaMA-Factory 0.9.6 has a
``kt_config`` of its own for inference, and so have KTransformers' forks in TrainingArguments. In such a list ours steps back.
"""

from __future__ import annotations

import dataclasses
import logging
from types import ModuleType
from typing import Any

from ...ground.errors import KTHookError
from ...settings.keys import KTArguments
from ...settings.sglang_keys import KTServingArguments

logger = logging.getLogger("llamafactory_kt")

_FORESEEN = frozenset({"kt_config"})
"""chats take its value from where LLaMA-Factory puts it; in training it is the forks' own"""


def settle_conflicts(module: ModuleType) -> None:
    """Build each list of the parser's module once (10 ms); where that fails because of our keys, take them out of that list.

    Raises:
        KTHookError: The list for chats cannot be built with our keys, so ``use_kt`` is not possible.
    """
    lists = {name: kinds for name, kinds in vars(module).items() if name.endswith("_ARGS") and isinstance(kinds, list)}
    given_up: dict[str, list[str]] = {}
    hopeless: dict[str, Exception] = {}
    for name, kinds in lists.items():
        ours = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, KTArguments)), None)
        if ours is None or (problem := _problem(kinds)) is None:
            continue
        where, conflicts = kinds.index(ours), _conflicts(kinds, ours)
        kinds[where] = _without(ours, conflicts)
        if _problem(kinds) is None:
            for key in conflicts:
                given_up.setdefault(key, []).append(name)
        else:
            kinds[where] = next(kind for kind in ours.__mro__ if not issubclass(kind, KTServingArguments))
            hopeless[name] = problem
    for key, names in given_up.items():
        level = logging.INFO if key in _FORESEEN else logging.WARNING
        logger.log(level, "%s is another class's option in %s, where ours steps back.", key, ", ".join(names))
    if hopeless:
        logger.info("The kt_* keys are not known in %s: %s", ", ".join(hopeless), next(iter(hopeless.values())))
    if problem := hopeless.get("_INFER_ARGS"):
        raise KTHookError(f"{module.__name__}._INFER_ARGS cannot take the kt_* keys: {problem}")


def accept_json(module: ModuleType, kind: Any) -> None:
    """Let LLaMA-Factory's own ``kt_config`` be JSON on the command line too: argparse refuses any text for a ``dict``."""
    metadata = kind.__dataclass_fields__["kt_config"].metadata
    namespace = {
        **{name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")},
        "__annotations__": {"kt_config": dict | str | None},
        "kt_config": dataclasses.field(default=None, metadata=metadata),
    }
    wider: Any = dataclasses.dataclass(type(kind.__name__, (kind,), namespace))
    for kinds in (module._INFER_ARGS, module._EVAL_ARGS):  # type: ignore[attr-defined]
        kinds[kinds.index(kind)] = wider


def _conflicts(kinds: list[Any], ours: Any) -> list[str]:
    """Which of our keys another class of the list has as an option."""
    others = [kind for kind in kinds if kind is not ours and dataclasses.is_dataclass(kind)]
    taken = {field.name for kind in others for field in dataclasses.fields(kind) if field.init}
    return sorted(taken & KTArguments.__dataclass_fields__.keys())


def _problem(kinds: list[Any]) -> Exception | None:
    """Why the list cannot be built."""
    from transformers import HfArgumentParser

    try:
        HfArgumentParser(kinds)
    except Exception as error:  # argparse's, and what resolving annotations raises
        return error
    return None


def _without(kind: Any, names: list[str]) -> Any:
    """The class without these options. The attributes stay, with their defaults."""
    fields = {n: dataclasses.field(default=kind.__dataclass_fields__[n].default, init=False, repr=False) for n in names}
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace = {**named, **fields, "__annotations__": dict.fromkeys(names, Any)}
    return dataclasses.dataclass(type(kind.__name__, (kind,), namespace))
