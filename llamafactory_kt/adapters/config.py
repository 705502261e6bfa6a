"""``adapter_config.json``: ranks, scalings, and what an adapter claims to be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..ground.errors import KTAdapterError

CONFIG = "adapter_config.json"


class LoraSettings:
    """The part of a PEFT LoraConfig that decides what the tensors mean (peft 0.18, ``tuners/lora/config.py``).

    ``raw`` has all keys; messages name the file ``path``.

    Raises:
        KTAdapterError: A value has another type than in PEFT.
    """

    def __init__(self, path: Path, raw: dict[str, Any]):
        self.path, self.raw = path, raw
        self.r: int = raw.get("r", 8)
        self.lora_alpha: float = raw.get("lora_alpha", 8)
        self.use_rslora = bool(raw.get("use_rslora", False))
        self.use_dora = bool(raw.get("use_dora", False))
        self.rank_pattern: dict[str, int] = raw.get("rank_pattern") or {}
        self.alpha_pattern: dict[str, float] = raw.get("alpha_pattern") or {}
        self.target_modules: list[str] | str | None = raw.get("target_modules")
        self._check_types()

    @classmethod
    def read(cls, path: Path) -> LoraSettings:
        """Read an adapter's configuration.

        Raises:
            KTAdapterError: It is missing, not JSON or not of a LoRA, or a value has another type than in PEFT.
        """
        if not path.is_file():
            raise KTAdapterError(f"{path} is missing: rank and lora_alpha of the adapter are unknown without it.")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise KTAdapterError(f"{path} is not valid JSON: {error}.") from error
        if not isinstance(raw, dict) or raw.get("peft_type", "LORA") != "LORA":
            found = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
            raise KTAdapterError(f"{path}: peft_type must be LORA, found {found!r}.")
        return cls(path, raw)

    def _check_types(self) -> None:
        def number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        wrong = []
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            wrong.append(f"r must be a positive whole number, found {self.r!r}")
        if not number(self.lora_alpha):
            wrong.append(f"lora_alpha must be a number, found {self.lora_alpha!r}")
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if not isinstance(pattern, dict) or not all(number(value) for value in pattern.values()):
                wrong.append(f"{name} must map module names to numbers, found {pattern!r}")
        if wrong:
            raise KTAdapterError(f"{self.path}: " + "; ".join(wrong) + ".")

    def expected_rank(self, module: str) -> int:
        """The rank that PEFT gives the module: from ``rank_pattern``, else ``r``."""
        return int(match_pattern(self.rank_pattern, module, self.r))

    def scaling(self, module: str, rank: int) -> float:
        """``alpha / rank``, with rsLoRA ``alpha / sqrt(rank)`` (peft 0.18, ``LoraLayer.update_layer``)."""
        alpha = match_pattern(self.alpha_pattern, module, self.lora_alpha)
        return float(alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def match_pattern(pattern: dict[str, Any], module: str, default: float) -> float:
    """The value that PEFT finds for a module in a ``rank_pattern`` or ``alpha_pattern``."""
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key  # imports all of transformers: not for adapters without patterns

    value: float = pattern.get(get_pattern_key(list(pattern), module), default)
    return value
