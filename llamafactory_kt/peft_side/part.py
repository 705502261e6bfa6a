"""The dense part of an adapter, by the modules and weights of one model: LoRA, and what is put in the place of weights."""

from __future__ import annotations

from dataclasses import dataclass

from ..adapters import Adapter
from ..ground.errors import KTAdapterError, name_some
from .changes import AddBias, AddDora, AddLora, Change

_MAGNITUDE, _BIAS = "lora_magnitude_vector.weight", "lora_B.bias"


@dataclass(frozen=True)
class ModuleLora:
    """The LoRA of one module."""

    trained: str
    """the module's name when it was trained, which the configuration's patterns are about"""
    tensors: dict[str, str]
    """``lora_A.weight``, ``lora_B.weight``, ... -> name in the file"""

    def sum(self, adapter: Adapter) -> AddLora:
        """The pair as a change of the module's weight, without what DoRA makes of it.

        Raises:
            KTAdapterError: The tensors are not those of the configuration's kind of LoRA, or the rank is not the configuration's.
        """
        settings, embedding = adapter.settings, "lora_embedding_A" in self.tensors
        halves = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        wanted = [*halves, *[_MAGNITUDE] * settings.use_dora, *[_BIAS] * settings.lora_bias]
        if missing := [part for part in wanted if part not in self.tensors]:
            raise KTAdapterError(
                f"{adapter.store.path}: {name_some(self.tensors.values(), 3)}: {missing[0]} is missing; the file is incomplete."
            )
        if more := [tensor for part, tensor in self.tensors.items() if part not in wanted]:
            raise KTAdapterError(
                f"{adapter.store.path}: {name_some(more, 3)} is no part of this LoRA: {settings.path.name} says use_dora: "
                f"{str(settings.use_dora).lower()} and lora_bias: {str(settings.lora_bias).lower()}."
            )
        a, b = (self.tensors[half] for half in halves)
        rank, expected = adapter.store.infos[a].shape[:1], settings.expected_rank(self.trained)
        if rank != (expected,):
            raise KTAdapterError(
                f"{adapter.store.path}: {a} has rank {name_some(rank) or 'none'}, {settings.path.name} says {expected}."
            )
        return AddLora((a, b), settings.scaling(self.trained, expected), embedding)

    def changes(self, adapter: Adapter, module: str) -> dict[str, Change]:
        """All of it as changes of the module's parameters, for merging.

        Raises:
            KTAdapterError: As :meth:`sum`.
        """
        change = self.sum(adapter)
        if _MAGNITUDE in self.tensors:
            change = AddDora((*change.tensors, self.tensors[_MAGNITUDE]), change.scaling, change.embedding)
        changes: dict[str, Change] = {f"{module}.weight": change}
        if _BIAS in self.tensors:
            changes[f"{module}.bias"] = AddBias((self.tensors[_BIAS],), change.scaling)
        return changes


@dataclass(frozen=True)
class PeftPart:
    """An adapter's non-expert tensors, by the modules and weights of one model."""

    lora: dict[str, ModuleLora]
    """module of the model -> its LoRA"""
    changes: dict[str, list[Change]]
    """parameter or buffer of the model -> what becomes of it"""
    targets: list[str]
    """PEFT's target_modules: a bare name if every module of that name has LoRA, else exact module names"""
    filtered: list[str]
    """the adapter's own targets without :data:`MLP_TARGETS`, which PEFT never gets as bare names"""
    left_out: list[str]
    """tensors that the scope ``attention`` leaves out"""

    @property
    def tensors(self) -> list[str]:
        """All tensors that are applied, in some order."""
        changed = (name for changes in self.changes.values() for change in changes for name in change.tensors)
        return list(dict.fromkeys([name for lora in self.lora.values() for name in lora.tensors.values()] + [*changed]))

    def merged(self, adapter: Adapter) -> dict[str, list[Change]]:
        """All of it as changes of weights, in the order in which they are to be made.

        Raises:
            KTAdapterError: As :meth:`ModuleLora.changes`.
        """
        merged = {name: list(changes) for name, changes in self.changes.items()}
        for module, lora in self.lora.items():
            for name, change in lora.changes(adapter, module).items():
                merged.setdefault(name, []).append(change)
        return merged

    @property
    def exact(self) -> list[str]:
        """Targets that are exact module names."""
        return [target for target in self.targets if "." in target]
