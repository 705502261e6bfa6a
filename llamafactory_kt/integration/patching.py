"""Replaces functions of LLaMA-Factory after looking up their parameters in :mod:`known_versions`.

A hook file has ``patch(module)``, which :mod:`bootstrap` calls once: it checks with :func:`expect`, defines functions with the
names of the stock ones, and calls :func:`replace` last. If a check fails, the module stays stock.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from .._version import __version__
from ..ground.errors import KTHookError
from . import bootstrap
from .known_versions import ADVICE, VERSIONS, rows

FORK = "llamafactory-kt"
"""a fork of LLaMA-Factory, which also installs the package ``llamafactory``"""


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> str:
    """The versions that every error about hooks names."""
    installed = [f"{name} {_version(name) or 'not installed'}" for name in ("llamafactory", "transformers")]
    return f"{', '.join(installed)}, llamafactory-kt-experts {__version__} (made for llamafactory {' and '.join(VERSIONS)})"


def check_stock() -> None:
    """Refuse a fork in place of stock LLaMA-Factory.

    Raises:
        KTHookError: The distribution of the fork is installed.
    """
    if found := _version(FORK):
        raise KTHookError(
            f"The package llamafactory may come from the fork {FORK} {found}; expected the stock distribution llamafactory. "
            f"pip uninstall {FORK} && pip install --force-reinstall --no-deps llamafactory=={VERSIONS[0]}. Installed: {versions()}."
        )


def expect(owner: ModuleType | type, name: str) -> Any:
    """The function of that name, after checking its parameters; None if it is missing and a version has none.

    Raises:
        KTHookError: Naming the function, what was found, what was expected, what to do and the versions.
    """
    where = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
    known = rows(f"{where}.{name}")
    function = getattr(owner, name, None)
    actual = " ".join(inspect.signature(function).parameters) if callable(function) else None
    if any(row.parameters == actual for row in known):
        return function
    found = "nothing of that name" if actual is None else _listed(actual)
    expected = " or ".join(f"{_listed(row.parameters)} of {' and '.join(row.versions)}" for row in known)
    raise KTHookError(
        f"{owner.__name__}.{name} cannot be hooked: found {found}, expected {expected}. {ADVICE}. Installed: {versions()}."
    )


def _listed(parameters: str | None) -> str:
    return "nothing" if parameters is None else f"({', '.join(parameters.split())})"


def replace(owner: ModuleType | type, *hooks: Any) -> None:
    """Put each hook in place of the function or class of its name. Static methods stay static."""
    for hook in hooks:
        name = hook.__name__
        static = isinstance(inspect.getattr_static(owner, name), staticmethod)
        functools.update_wrapper(hook, getattr(owner, name), updated=())
        setattr(owner, name, staticmethod(hook) if static else hook)


def require_hooks(*more: str) -> None:
    """Import the hooked modules that every chat needs, and ``more``, and check that their hooks are in place.

    Raises:
        KTHookError: The first hook that could not be applied.
    """
    always = (
        "llamafactory.hparams.model_args", "llamafactory.hparams.parser", "llamafactory.model.loader",
        "llamafactory.chat.hf_engine",
    )  # fmt: skip
    for name in (*always, *more):
        try:
            module = import_module(name)
        except (ImportError, OSError) as reason:  # a library below it is broken or only partly installed
            raise KTHookError(
                f"{name} cannot be imported: {reason}. llamafactory-kt doctor may say more. {versions()}"
            ) from reason
        error = bootstrap.failures.get(name)
        if isinstance(error, KTHookError):
            raise error
        if error is not None:
            raise KTHookError(f"{name} cannot be hooked: {error!r}. {versions()}")
        if not bootstrap.is_patched(module):
            raise KTHookError(f"{name} was imported before llamafactory_kt could hook into it. {versions()}")


def asks_for(key: str, args: Any = None, command_line: Sequence[str] | None = None) -> bool:
    """Whether raw arguments set a key to true: a dictionary, a list of words, or (None) the command line with its file.

    A file that cannot be read sets nothing; LLaMA-Factory reports what is wrong with it.

    Args:
        command_line: in place of ``sys.argv[1:]``.
    """
    line = sys.argv[1:] if command_line is None else command_line
    words = args if isinstance(args, list) else line if args is None else []
    value: Any = args.get(key) if isinstance(args, dict) else None
    if args is None and words and words[0].endswith((".yaml", ".yml", ".json")):
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            loaded = yaml.safe_load(Path(words[0]).read_text(encoding="utf-8"))
            value = loaded.get(key) if isinstance(loaded, dict) else None
    for position, word in enumerate(words):
        name, assigned, text = str(word).lstrip("-").partition("=")
        if name == key:
            following = str(words[position + 1]) if position + 1 < len(words) else "true"
            value = text if assigned else ("true" if following.startswith("-") else following)
    return str(value).lower() in ("true", "1", "yes", "t", "y")
