"""A model's ``config.json``: what transformers says of one that it cannot use, as one clear error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..ground.errors import KTError, KTModelError, KTPathError, describe, first_line


@contextlib.contextmanager
def reading_configuration(name: str | Path) -> Iterator[None]:
    """While transformers reads a model's configuration: its errors say what is wrong with the files.

    Raises:
        KTModelError: The model type is unknown, and transformers has the model's class under another one.
        KTPathError: There is no such model.
    """
    try:
        yield
    except KTError:
        raise
    except Exception as error:  # of any kind: JSON of other types, strict dataclasses, remote code
        if hint := _other_type(name):
            raise KTModelError(hint) from error
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            reason = "it has no config.json."
        else:
            reason = first_line(error) if isinstance(error, OSError | ValueError) else describe(error)
        raise KTPathError(f"{name} is not a model that can be opened: {reason}") from error


def _other_type(name: str | Path) -> str:
    """What to write in ``config.json`` if its model type is unknown and its class is not: published Kimi-K2 checkpoints say ``kimi_k2``
    and have DeepSeek-V3's architecture. Empty if that is not so."""
    from transformers import CONFIG_MAPPING, PretrainedConfig
    from transformers.models.auto import modeling_auto

    try:
        raw, _ = PretrainedConfig.get_config_dict(name)
        wanted, classes = raw.get("model_type"), raw.get("architectures")
    except Exception:  # which the caller reports
        return ""
    if not isinstance(wanted, str) or wanted in CONFIG_MAPPING or not isinstance(classes, list):
        return ""
    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind = next((kind for kind, model in known.items() if model in classes), None)
    if kind is None:
        return ""
    return (
        f"{name}: config.json has the model_type {wanted!r}, which this transformers does not know, but the class that it names, "
        f'{known[kind]}, is its {kind!r}. Write "model_type": "{kind}" in config.json.'
    )


def check_configuration(name: str | Path, config: Any) -> None:
    """Check what transformers would fail on, while it builds the model, without saying where.

    Raises:
        KTModelError: The model type is unknown, and transformers has the model's class under another one; or an activation is unknown.
    """
    from transformers.activations import ACT2FN

    remote = not type(config).__module__.startswith("transformers.")
    if hint := _other_type(name) if remote else "":
        raise KTModelError(hint)
    for key, value in _activations(config.to_dict()):
        if value not in ACT2FN:
            raise KTModelError(
                f"{name}: config.json has {key}: {value!r}, which is no activation that transformers has. They are "
                f"{', '.join(sorted(ACT2FN))}. Restore the model's own config.json."
            )


def _activations(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", name) for inner, name in _activations(value))
        elif isinstance(value, str) and str(key).endswith(("hidden_act", "hidden_activation")):
            yield key, value
