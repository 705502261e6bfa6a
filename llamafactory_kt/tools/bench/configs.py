"""The configurations that a bench measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ground.errors import KTConfigError
from ...integration.chat_config import overridden

CONFIGURED, BASE, STOCK = "as configured", "base", "stock"
_ADAPTER_KEYS = ("adapter_name_or_path", "kt_moe_lora_path")


@dataclass(frozen=True)
class BenchConfig:
    """One configuration to measure."""

    name: str
    config: dict[str, Any]
    """LLaMA-Factory's keys for a chat"""
    stock: bool = False
    """stock transformers with the adapter merged; ``use_kt`` and the ``kt_*`` keys are ignored"""

    @property
    def loaded_config(self) -> dict[str, Any]:
        """The keys that LLaMA-Factory loads. Stock loads the base model without KT; its adapter is merged afterwards."""
        if not self.stock:
            return self.config
        return {k: v for k, v in _without_adapter(self.config).items() if k != "use_kt" and not k.startswith("kt_")}


def _without_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _ADAPTER_KEYS}


def bench_configs(config: Mapping[str, Any], against: Sequence[str] = (), *, base: bool = True) -> list[BenchConfig]:
    """The configuration, the same without its adapter if it has one, and one more for each word of ``against``.

    Args:
        against: ``base``, ``stock``, or ``key=value``s with spaces between them.
        base: whether to measure the base model too.

    Raises:
        KTConfigError: A word is none of these.
    """
    found = [BenchConfig(CONFIGURED, dict(config))]
    words = [BASE] if base and any(config.get(key) for key in _ADAPTER_KEYS) else []
    for word in dict.fromkeys([*words, *against]):
        if word == BASE:
            found.append(BenchConfig(word, _without_adapter(config)))
        elif word == STOCK:
            found.append(BenchConfig(word, dict(config), stock=True))
        elif word and all("=" in part for part in word.split()):
            found.append(BenchConfig(word, overridden(config, word.split())))
        else:
            raise KTConfigError(f"--against: unknown word {word!r}, expected base, stock or key=value.")
    return found
