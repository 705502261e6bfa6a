"""Finds out which of transformers' auto classes loads a model, without importing the configurations of all models.

LLaMA-Factory's ``load_model`` looks for a configuration's class in the ``_model_mapping.keys()`` of three auto classes, and
listing these imports every configuration. Made for transformers 5.6: replaces ``keys`` of a ``_LazyAutoMapping``, and reads its
``_config_mapping``, ``_model_mapping`` and ``_extra_content``. A mapping without these attributes is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from ..ground.internals import TESTED, Internal

INTERNAL = Internal("auto-classes", "transformers", TESTED["transformers"])
AUTO_CLASSES = "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForTextToWaveform"
"""the auto classes that LLaMA-Factory asks"""


def answer_by_name() -> None:
    """Let these three reject a configuration by its class name; they list all classes only if the name matches."""
    if not INTERNAL.usable:
        return
    import transformers

    for name in AUTO_CLASSES:
        mapping: Any = getattr(getattr(transformers, name, None), "_model_mapping", None)
        if all(hasattr(mapping, known) for known in ("_config_mapping", "_model_mapping", "_extra_content")):
            mapping.keys = _Classes(mapping)  # of this object alone


class _Classes(Collection[type]):
    """The keys of a ``_LazyAutoMapping``. Calling it returns itself, so it can stand in for the method ``keys``."""

    def __init__(self, mapping: Any):
        self._mapping = mapping
        kinds = mapping._config_mapping.items()
        self._names = {name for kind, name in kinds if kind in mapping._model_mapping}

    def __call__(self) -> _Classes:
        return self

    def __contains__(self, config_class: object) -> bool:
        name = getattr(config_class, "__name__", None)
        return (name in self._names or config_class in self._mapping._extra_content) and config_class in list(self)

    def __iter__(self) -> Iterator[type]:
        return iter(type(self._mapping).keys(self._mapping))

    def __len__(self) -> int:
        return len(self._mapping)
