"""Import hooks that patch LLaMA-Factory's modules when they are imported.

Runs at the end of ``import torch``, so it imports only the standard library. ``__spec__._initializing``, which is true
while a module is executed, is CPython's own (3.11 to 3.13); without it, a module counts as fully imported.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader, SourcelessFileLoader
from types import ModuleType
from typing import Any

from .early_interrupt import end_imports_at_once

# module of LLaMA-Factory -> our module; its patch(module) is called once that module has been executed
TARGETS = {
    "llamafactory.hparams.model_args": "llamafactory_kt.integration.hparams.model_args",
    "llamafactory.hparams.parser": "llamafactory_kt.integration.hparams.parser",
    "llamafactory.model.loader": "llamafactory_kt.integration.model.loader",
    "llamafactory.model.patcher": "llamafactory_kt.integration.model.patcher",
    "llamafactory.chat.hf_engine": "llamafactory_kt.integration.hf_engine",
    "llamafactory.chat.chat_model": "llamafactory_kt.integration.terminal.chat_model",
    "llamafactory.api.app": "llamafactory_kt.integration.api.requests",
    "llamafactory.webui.components.chatbot": "llamafactory_kt.integration.webui.chatbot",
    "llamafactory.webui.components.infer": "llamafactory_kt.integration.webui.infer",
    "llamafactory.webui.chatter": "llamafactory_kt.integration.webui.chatter",
    "llamafactory.webui.interface": "llamafactory_kt.integration.webui.interface",
    "llamafactory.chat.sglang_engine": "llamafactory_kt.integration.sglang_engine",
    "llamafactory.v1.config.arg_parser": "llamafactory_kt.integration.v1_arg_parser",
}

failures: dict[str, BaseException] = {}
"""hooks that could not be applied, by module; the module itself stays stock"""

_MARK = "__llamafactory_kt__"


def activate() -> None:
    """Register the hooks; modules that are already imported are patched now. Calling it again does nothing."""
    if is_active():
        return
    sys.meta_path.insert(0, _Finder())
    end_imports_at_once()
    for name in TARGETS:
        module = sys.modules.get(name)
        if module is None:
            continue
        if getattr(module.__spec__, "_initializing", False) and type(module.__spec__) is ModuleSpec:
            # it imports torch itself, as in LLaMA-Factory's src/api.py; the finder comes too late for it, and a patch too early
            module.__spec__.__class__ = _PatchingSpec
        else:
            _patch(module)


def is_active() -> bool:
    """Whether the hooks are registered in this process."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def is_patched(module: ModuleType) -> bool:
    """Whether the module's hooks are in place."""
    return hasattr(module, _MARK)


def _patch(module: ModuleType) -> None:
    """Apply the module's hooks, once; never raises into the import that caused it."""
    from importlib import import_module

    if is_patched(module):
        return
    try:
        import_module(TARGETS[module.__name__]).patch(module)
        setattr(module, _MARK, True)
    except Exception as error:
        failures[module.__name__] = error


class _Finder(MetaPathFinder):
    """Finds the target modules as usual, but with a loader that patches after executing."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in TARGETS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        # Only the interpreter's own loaders are wrapped: others may be proxies that look themselves up again.
        if spec is not None and type(spec.loader) in (SourceFileLoader, SourcelessFileLoader):
            spec.loader = _PatchingLoader(spec.loader)
        return spec


class _PatchingSpec(ModuleSpec):
    """The spec of a module that is being executed; patches it as soon as CPython notes that it has been."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            if (module := sys.modules.get(self.name)) is not None:  # its import has not failed
                _patch(module)


class _PatchingLoader(Loader):
    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:  # inspect, pkgutil and tracebacks ask the loader for the source
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _patch(module)
