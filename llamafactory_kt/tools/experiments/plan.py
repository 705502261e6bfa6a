"""The variants of a comparison, from configurations, sweeps and ablations, and which of them share a loaded model."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...ground.errors import KTConfigError
from ...integration.chat_config import read_yaml

PARTS = {
    "off": "no adapter",
    "attention": "all of the adapter but its routed experts",
    "experts": "the adapter's routed experts only",
    "on": "the whole adapter",
}
_GENERATING = frozenset({
    "do_sample", "temperature", "top_p", "top_k", "num_beams", "max_length", "max_new_tokens", "repetition_penalty",
    "length_penalty", "skip_special_tokens",
})  # fmt: skip
"""the keys of LLaMA-Factory's GeneratingArguments"""


@dataclass(frozen=True)
class Variant:
    """One configuration of a comparison, with a part of its adapter."""

    name: str
    config: Mapping[str, Any]
    part: str = "on"
    """key of :data:`PARTS`"""

    @property
    def adapters(self) -> list[str]:
        """Adapters that are applied, at least in part."""
        value = self.config.get("adapter_name_or_path") if self.part != "off" else None
        names = value.split(",") if isinstance(value, str) else value or []
        return [str(name).strip() for name in names]

    @property
    def applied(self) -> tuple[list[str], str]:
        """The adapters and their part; equal if two variants of one model have the same adapter weights."""
        return self.adapters, self.part if self.adapters else "off"

    @property
    def generating(self) -> dict[str, Any]:
        """The generating keys."""
        return {key: value for key, value in self.config.items() if key in _GENERATING}


def plan_variants(paths: Sequence[Path], overrides: Sequence[str] = (), ablate: bool = False) -> list[Variant]:
    """Read configurations into variants, in order; the first one is the reference.

    Lists under ``sweep:`` are multiplied out. With ``ablate``, each configuration gives one variant for each of :data:`PARTS`.

    Raises:
        KTConfigError: A sweep is malformed, there is nothing to compare, or no adapter to ablate.
    """
    variants = [variant for path in paths for variant in _sweep(path.stem, read_yaml(path, overrides))]
    if ablate:
        variants = [part for variant in variants for part in _ablate(variant)]
    if len(variants) < 2:
        raise KTConfigError(
            "There is one configuration and nothing to compare it with; give more, a sweep, or --ablate."
        )
    seen: Counter[str] = Counter()
    for number, variant in enumerate(variants):  # files in several directories may have the same name
        seen[variant.name] += 1
        if (count := seen[variant.name]) > 1:
            variants[number] = replace(variant, name=f"{variant.name} ({count})")
    return variants


def _sweep(name: str, config: dict[str, Any]) -> list[Variant]:
    sweep = config.pop("sweep", {})
    if not isinstance(sweep, dict) or not all(isinstance(values, list) and values for values in sweep.values()):
        raise KTConfigError(f"{name}: sweep must be a dictionary of keys with lists of values, found {sweep!r}.")
    variants = []
    for values in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, values, strict=True))
        keys = {key: value for key, value in {**config, **chosen}.items() if value is not None}
        words = ", ".join(f"{key}={_short(value)}" for key, value in chosen.items())
        variants.append(Variant(f"{name}: {words}" if words else name, keys))
    return variants


def _short(value: Any) -> str:
    return Path(value).name if isinstance(value, str) and "/" in value else json.dumps(value, ensure_ascii=False)


def _ablate(variant: Variant) -> list[Variant]:
    if variant.config.get("kt_merge_adapter"):
        raise KTConfigError(
            f"{variant.name}: --ablate takes the adapter apart, but a merged adapter has no parts; remove kt_merge_adapter."
        )
    if variant.config.get("use_kt") is not True or not variant.adapters or variant.config.get("kt_moe_lora_path"):
        raise KTConfigError(f"{variant.name}: --ablate needs use_kt: true and an adapter in adapter_name_or_path.")
    return [Variant(f"{variant.name}: {part}", variant.config, part) for part in PARTS]


def group_variants(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Group variants that one loaded model can serve: only adapters and generating keys differ."""
    groups: dict[str, list[Variant]] = {}
    for variant in variants:
        ignored = _GENERATING | ({"adapter_name_or_path", "kt_lora_scope"} if _can_switch(variant) else frozenset())
        key = json.dumps({k: v for k, v in variant.config.items() if k not in ignored}, sort_keys=True, default=str)
        groups.setdefault(f"{_can_switch(variant)} {key}", []).append(variant)
    return list(groups.values())


def _can_switch(variant: Variant) -> bool:
    config = variant.config
    local = all(Path(name).expanduser().is_dir() for name in variant.adapters)
    fixed = config.get("kt_merge_adapter") or {"kt_moe_lora_path", "adapter_folder"} & set(config)
    return config.get("use_kt") is True and local and not fixed
