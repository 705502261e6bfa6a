"""The question which of transformers' auto classes loads a model, answered without importing them all.

LLaMA-Factory's ``load_model`` looks for a configuration's class among those of three auto classes. Listing them imports the
configurations of a hundred other models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

AUTO_CLASSES = "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForTextToWaveform"
"""whose ``_model_mapping.keys()`` LLaMA-Factory looks into"""


def answer_by_name() -> None:
    """Have those three tell by its name that a configuration is not theirs; they list all classes only where it may be."""
    import transformers

    for name in AUTO_CLASSES:
        mapping: Any = getattr(getattr(transformers, name, None), "_model_mapping", None)
        if all(hasattr(mapping, known) for known in ("_config_mapping", "_model_mapping", "_extra_content")):
            mapping.keys = _Classes(mapping)  # of this object alone


class _Classes(Collection[type]):
    """The keys of a ``_LazyAutoMapping``; calling it gives it, as the mapping's method would."""

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
