"""Tensors of an adapter that are no LoRA: whole weights, biases and rows of embeddings, and whose place they take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import IntEnum

from ..adapters import Adapter
from ..adapters.keys import split_module
from ..ground.errors import KTAdapterError, name_some
from .changes import Change, Replace, ReplaceRows

ROWS = "trainable_tokens_delta"


class _Level(IntEnum):
    """Later ones take the place of earlier ones, as PEFT's wrappers lie around each other."""

    BASE = 0
    """the base model's own weight: biases, and embeddings that PEFT saved because they were resized"""
    COPY = 1
    """of a module among ``modules_to_save``"""
    ROWS = 2
    """some tokens' embeddings"""


class WholeWeights:
    """Collects them by the model's parameters."""

    def __init__(self, adapter: Adapter):
        self._adapter = adapter
        self._found: dict[str, dict[_Level, list[str]]] = defaultdict(lambda: defaultdict(list))

    def add(self, parameter: str, tensor: str) -> None:
        """Note that a tensor changes a parameter or buffer of the model.

        Raises:
            KTAdapterError: Another one is for the same place.
        """
        level = self._level(tensor)
        same = self._found[parameter][level]
        if same and level is not _Level.COPY:  # which save_embedding_layers=True writes under two names
            raise KTAdapterError(f"{self._adapter.store.path}: {same[0]} and {tensor} are the same weight.")
        same.append(tensor)

    def _level(self, tensor: str) -> _Level:
        if tensor.endswith(ROWS):
            return _Level.ROWS
        if ".base_layer." in tensor or ".original_module." in tensor:
            return _Level.BASE
        module, _, leaf = tensor.rpartition(".")
        # a copy that is kept tied to a saved one lies beside its base
        tied = f"{module}.original_module.{leaf}" in self._adapter.store.infos
        saved = ".modules_to_save." in tensor or self._adapter.settings.saves(split_module(tensor)[0])
        return _Level.COPY if tied or saved else _Level.BASE

    def changes(self, ties: Mapping[str, set[str]], embeddings: str) -> dict[str, list[Change]]:
        """What becomes of each parameter. Of those that are one weight by the model's configuration, all change, as in PEFT, unless the
        file has a tensor for one itself, or the change is a copy's, or of rows of another than the input embeddings.

        Args:
            ties: parameter -> the others that are the same weight.
            embeddings: the input embeddings' weight.

        Raises:
            KTAdapterError: The configuration says that a module was trained as a whole, and the file has no tensor of it.
        """
        self._check_complete(ties)
        changes: dict[str, list[Change]] = {}
        for level in _Level:
            for parameter, found in self._found.items():
                if level not in found:
                    continue
                tensors = tuple(found[level])
                names = (parameter, *ties.get(parameter, ()))
                change: Change = Replace(tensors)
                if level is _Level.ROWS:
                    change = ReplaceRows(tensors, self._rows(tensors[0], names))
                shared = level is _Level.BASE or (level is _Level.ROWS and parameter == embeddings)
                others = ties.get(parameter, set()) if shared else set()
                for name in {parameter, *(other for other in others if level not in self._found.get(other, {}))}:
                    changes.setdefault(name, []).append(change)
        return changes

    def _rows(self, tensor: str, parameters: Sequence[str]) -> tuple[int, ...]:
        """The tokens; ``parameters`` are the weight's names. Of tied embeddings, PEFT writes both and may name one alone."""
        indices = self._adapter.settings.trainable_token_indices
        if not isinstance(indices, dict):
            return tuple(indices)
        modules = [split_module(tensor)[0], *(name.rpartition(".")[0] for name in parameters)]
        found = (rows for module in modules for name, rows in indices.items() if f".{module}".endswith(f".{name}"))
        return tuple(next(found, ()))

    def _check_complete(self, ties: Mapping[str, set[str]]) -> None:
        settings = self._adapter.settings
        tensors = [tensor for found in self._found.values() for same in found.values() for tensor in same]
        modules = {split_module(tensor)[0] for tensor in tensors}
        rows = settings.trainable_token_indices
        of_modules = rows if isinstance(rows, dict) else {}
        wanted = [*settings.modules_to_save, *of_modules]
        absent = [name for name in wanted if not any(f"{name}." in f"{module}." for module in modules)]
        with_rows = [parameter for parameter, found in self._found.items() if _Level.ROWS in found]
        if any(ties.get(parameter) for parameter in with_rows):  # PEFT saves the same rows once
            written = [of_modules[name] for name in of_modules if name not in absent]
            absent = [name for name in absent if of_modules.get(name) not in written]
        if rows and not with_rows:  # PEFT drops them when it converts an adapter to plain LoRA
            absent.append("some tokens' embeddings (trainable_token_indices)")
        if absent:
            raise KTAdapterError(
                f"{settings.path} says that {name_some(absent)} was trained as a whole, and {self._adapter.store.path.name} has no tensor "
                "of it; the file is incomplete."
            )
