"""Which configurations a bench measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ground.errors import KTConfigError

CONFIGURED, BASE, STOCK = "as configured", "base", "stock"
_ADAPTER_KEYS = ("adapter_name_or_path", "kt_moe_lora_path")


@dataclass(frozen=True)
class Row:
    """One configuration to measure."""

    name: str
    config: dict[str, Any]
    """of LLaMA-Factory, for chatting"""
    stock: bool = False
    """by stock transformers with the adapter merged, whatever the configuration says of KT"""

    @property
    def loaded_config(self) -> dict[str, Any]:
        """What LLaMA-Factory gets. Stock's has neither KT nor an adapter, which is merged after the load."""
        if not self.stock:
            return self.config
        return {k: v for k, v in without_adapter(self.config).items() if k != "use_kt" and not k.startswith("kt_")}


def without_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the base model."""
    return {key: value for key, value in config.items() if key not in _ADAPTER_KEYS}


def rows(config: Mapping[str, Any], against: Sequence[str] = (), *, base: bool = True) -> list[Row]:
    """The configuration, the same without its adapter if it has one, and one row for each word of ``against``.

    Args:
        against: ``base``, ``stock``, or ``key=value``.
        base: whether the row without the adapter is wanted.

    Raises:
        KTConfigError: A word is none of these.
    """
    found = [Row(CONFIGURED, dict(config))]
    words = [BASE] if base and any(config.get(key) for key in _ADAPTER_KEYS) else []
    for word in dict.fromkeys([*words, *against]):
        if word == BASE:
            found.append(Row(word, without_adapter(config)))
        elif word == STOCK:
            found.append(Row(word, dict(config), stock=True))
        elif "=" in word:
            found.append(Row(word, {**config, **overrides([word])}))
        else:
            raise KTConfigError(f"--against: unknown word {word!r}, expected base, stock or key=value.")
    return found


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """The keys and values of ``key=value`` words; values are YAML.

    Raises:
        KTConfigError: A word is none.

    >>> overrides(["kt_num_threads=4", "kt_backend=AMXINT4"])
    {'kt_num_threads': 4, 'kt_backend': 'AMXINT4'}
    """
    import yaml

    if wrong := [word for word in words if "=" not in word]:
        raise KTConfigError(f"expected key=value, found {wrong[0]!r}.")
    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
