"""Replacing functions of LLaMA-Factory after checking that they are the ones that were expected."""

from __future__ import annotations

import contextlib
import inspect
import sys
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from .._version import __version__
from ..ground.errors import KTHookError
from . import bootstrap

FORK = "llamafactory-kt"
"""A fork of the whole of LLaMA-Factory that installs the package ``llamafactory``."""

_MARK = "__llamafactory_kt__"


def versions() -> str:
    """The versions an error about hooks must name."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    return (
        f"llamafactory {version('llamafactory')}, transformers {version('transformers')}, "
        f"llamafactory-kt-experts {__version__} (made for llamafactory 0.9.5)"
    )


def check_stock() -> None:
    """Refuse a fork in place of stock LLaMA-Factory.

    Raises:
        KTHookError: The distribution of the fork is installed.
    """
    try:
        found = metadata.version(FORK)
    except metadata.PackageNotFoundError:
        return
    raise KTHookError(
        f"The package llamafactory may come from the fork {FORK} {found}; expected the stock distribution llamafactory. "
        f"pip uninstall {FORK} && pip install --force-reinstall --no-deps llamafactory==0.9.5. Installed: {versions()}."
    )


def expect(module: ModuleType | type, name: str, parameters: tuple[str, ...]) -> Any:
    """The module's function of that name, whose parameters must be the expected ones.

    Raises:
        KTHookError: Naming the function, what was found, what was expected and the versions.
    """
    function = getattr(module, name, None)
    found = "nothing of that name"
    if callable(function):
        found = f"({', '.join(inspect.signature(function).parameters)})"
        if tuple(inspect.signature(function).parameters) == parameters:
            return function
    raise KTHookError(
        f"{module.__name__}.{name} cannot be hooked: found {found}, expected ({', '.join(parameters)}). "
        f"Installed: {versions()}."
    )


def is_patched(module: ModuleType | type) -> bool:
    """Whether the module (or class) was patched before, so that a second patch would wrap a wrapper."""
    return hasattr(module, _MARK)


def replace(module: ModuleType | type, **functions: Any) -> None:
    """Set several attributes of a module (or class) at once; called last, when nothing can fail any more."""
    for name, function in functions.items():
        setattr(module, name, function)
    setattr(module, _MARK, True)


def require_hooks(*more: str) -> None:
    """Import the hooked modules that every chat needs, and ``more``, and check that their hooks are in place.

    Raises:
        KTHookError: The first hook that could not be applied.
    """
    always = (
        "llamafactory.hparams.model_args",
        "llamafactory.hparams.parser",
        "llamafactory.model.loader",
        "llamafactory.chat.hf_engine",
    )
    for name in (*always, *more):
        try:
            module = import_module(name)
        except (ImportError, OSError) as reason:  # a library below it is broken or was installed in part
            raise KTHookError(
                f"{name} cannot be imported: {reason}. llamafactory-kt doctor may say more. {versions()}"
            ) from reason
        if error := bootstrap.failures.get(name):
            raise (
                error
                if isinstance(error, KTHookError)
                else KTHookError(f"{name} cannot be hooked: {error!r}. {versions()}")
            )
        if not is_patched(module):
            raise KTHookError(f"{name} was imported before llamafactory_kt could hook into it. {versions()}")


def asks_for(key: str, args: Any = None) -> bool:
    """Whether raw arguments (a dict, a list of words, or the command line with its YAML file) set a key to true.

    A file that cannot be read asks for nothing; LLaMA-Factory will say what is wrong with it.
    """
    words = args if isinstance(args, list) else sys.argv[1:] if args is None else []
    asked: Any = args.get(key) if isinstance(args, dict) else None
    if args is None and words and words[0].endswith((".yaml", ".yml", ".json")):
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            loaded = yaml.safe_load(Path(words[0]).read_text(encoding="utf-8"))
            asked = loaded.get(key) if isinstance(loaded, dict) else None
    for position, word in enumerate(words):
        name, found, value = str(word).lstrip("-").partition("=")
        if name == key:
            following = str(words[position + 1]) if position + 1 < len(words) else "true"
            asked = value if found else ("true" if following.startswith("-") else following)
    return str(asked).lower() in ("true", "1", "yes", "t", "y")
