"""From names in a checkpoint or an adapter to names in a model, by transformers' own rules.

transformers has no public function for this. ``transformers.conversion_mapping`` and ``transformers.core_model_loading``
are used here alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch

from ..ground.errors import KTModelError
from ..ground.internals import SWITCH, TESTED, Internal

_KNOWN: dict[str, dict[str, Any]] = {
    "MergeModulelist": {"dim": 0}, "Concatenate": {"dim": 1}, "Transpose": {"dim0": 1, "dim1": 2, "check_dims": True},
    "Interleave": {"dim": 1, "inverse": False},
}  # fmt: skip
"""the conversions of experts, with the settings that they are known with"""
_TEXT = re.compile(r"^(?:(?:model|language_model)\.)+")
"""where a text model's own modules begin (``model.language_model.layers``; ``language_model.model.layers`` in transformers 4)"""
INTERNAL = Internal("transformers-names", "transformers", TESTED["transformers"], essential=True)


def _conversion_rules(model: Any, **options: bool) -> list[Any]:
    if not INTERNAL.usable:
        raise KTModelError(
            f"Names in checkpoints are mapped by transformers' own rules, which {SWITCH} switches off; unset that."
        )
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules: list[Any] = get_model_conversion_mapping(model, **options)
    return rules


class Target(NamedTuple):
    """What transformers makes of one tensor of a checkpoint."""

    name: str
    """parameter of the model"""
    operations: list[str]
    """the conversions on the way: class names such as ``MergeModulelist``, with the settings of one that differs from
    :data:`_KNOWN`; empty for a tensor that is only renamed"""
    source: int
    """which of the converter's sources the tensor is, counted from 0"""


class CheckpointNames:
    """The names of a model's checkpoints.

    Args:
        model: empty or loaded, with the parameters that the checkpoint fills.
    """

    def __init__(self, model: Any):
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = _conversion_rules(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        self._model, self._prefix, self._state = model, model.base_model_prefix, model.state_dict()

    def renamed(self, name: str) -> str:
        """The parameter that the checkpoint's tensor is, or its own name where it is converted on the way."""
        target = self.target(name)
        return name if target.operations else target.name

    def target(self, name: str) -> Target:
        """Where the checkpoint's tensor goes."""
        target, pattern = self._map(name)
        if pattern is None:
            return Target(target, [], 0)
        rule = self._by_pattern[pattern]
        return Target(target, [_described(each) for each in rule.operations], rule.source_patterns.index(pattern))

    def _map(self, name: str) -> tuple[str, str | None]:
        """A tensor's parameter and the converter's source pattern, as ``convert_and_load_state_dict_in_model`` finds them."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if target not in self._state and name in self._state:  # renamed by mistake
            target, pattern = rename_source_key(name, [], [], self._prefix, self._state)
        return target, pattern

    def converted(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Let transformers itself convert checkpoint tensors, as it does while it loads them; returns the parameters by name."""
        from transformers.core_model_loading import WeightRenaming, dot_natural_key

        rules: dict[str, Any] = {}
        for name in sorted(tensors, key=dot_natural_key):
            target, pattern = self._map(name)
            if target not in rules:
                rules[target] = deepcopy(self._by_pattern[pattern]) if pattern else WeightRenaming(name, target)
            rules[target].add_tensor(target, name, pattern or name, tensors[name])
        found = {}
        for target, rule in rules.items():
            for name, value in rule.convert(target, model=self._model, config=self._model.config).items():
                found[name] = value[0] if isinstance(value, list) else value
        return found


def _described(operation: Any) -> str:
    name = type(operation).__name__
    settings = {key: value for key, value in vars(operation).items() if value is not None}
    return name if settings == _KNOWN.get(name, settings) else f"{name}({settings})"


def tied_weights(model: Any) -> dict[str, set[str]]:
    """Parameter -> the others that are the same weight by the model's configuration (``lm_head`` and the embeddings, mostly)."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return {name: group - {name} for group in groups.values() for name in group}


class ModuleNames:
    """The names of a model's modules, in an adapter trained with this or an older transformers."""

    def __init__(self, model: Any):
        from transformers.core_model_loading import WeightRenaming

        rules = _conversion_rules(model, add_legacy=False)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.known = {name for name, _ in model.named_modules()}

    def find(self, module: str) -> str | None:
        """The model's module of that name, also by an old name (Mixtral's ``block_sparse_moe``), without ``model.``, or by its name
        in the text-only class of an image-text model, or the other way round (``model.layers``, ``model.language_model.layers``)."""
        if module in self.known:
            return module
        renamed = f"{module}.weight"
        for rule in self._renamings:
            renamed, _ = rule.rename_source_key(renamed)
        renamed = renamed.removesuffix(".weight").removeprefix(
            "thinker."
        )  # Qwen3-Omni's, which is the whole model here
        inner = renamed.removeprefix("model.")
        stem = _TEXT.sub("", renamed)
        candidates = (renamed, f"model.{renamed}", inner, f"model.language_model.{stem}", f"model.{stem}")
        return next((candidate for candidate in candidates if candidate in self.known), None)
