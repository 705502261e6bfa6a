"""Writing adapters, one writer a layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..ground.atomic_output import replacing
from ..ground.errors import KTAdapterError
from ..ground.tensors.stores import SAFETENSORS
from ..ground.tensors.torch_archive import write_torch_archive
from ..ground.tensors.writer import write_safetensors
from .adapter import Adapter
from .bundle import BUNDLE, write_manifest
from .config import CONFIG
from .keys import MLP_TARGETS, PEFT_PREFIX, split_module
from .uniform import PARTS, Uniform, UniformRest

Tensors = Iterator[tuple[str, torch.Tensor]]
_FORMAT = {"format": "pt"}


def write_moe_lora(uniform: Uniform, path: Path) -> None:
    """``moe_lora.pt`` (format E): the routed experts only."""
    with replacing(path) as temporary:
        layers = ((f"layer_{number}", tensors) for number, tensors in uniform.layers())
        write_torch_archive(temporary, _metadata(uniform), layers)


def write_stacked(uniform: Uniform, path: Path) -> None:
    """One safetensors file with a KT bundle's stacked tensors; rank, alpha and sizes are its metadata."""
    metadata = {name: str(value) for name, value in _metadata(uniform).items()}
    with replacing(path) as temporary:
        write_safetensors(temporary, _stacked_names(uniform), _stacked(uniform), metadata)


def write_peft(uniform: Uniform, path: Path, earlier: str | None = None) -> None:
    """Format B: one tensor pair per expert and projection, with all other tensors, under PEFT's names."""
    names = [*_other_names(uniform.adapter), *_per_expert_names(uniform, PEFT_PREFIX)]
    tensors = chain(_others(uniform.adapter), _per_expert(uniform, PEFT_PREFIX))
    _write_directory(path, names, tensors, _whole_config(uniform), earlier)


def write_bundle(uniform: Uniform, path: Path, earlier: str | None = None) -> None:
    """Format C: stacked experts in bfloat16 beside the other tensors, and a manifest with checksums.

    Raises:
        KTAdapterError: The other tensors have another rank or alpha than the experts: a bundle has one config for both.
    """
    settings, adapter = uniform.adapter.settings, uniform.adapter
    config = _expert_config(uniform) if not adapter.other_names else _config(adapter)
    if (config["r"], config["lora_alpha"]) != (uniform.lora_rank, uniform.lora_alpha) or settings.use_rslora:
        raise KTAdapterError(
            f"A KT bundle has one rank and one alpha for experts and the rest: the experts have {uniform.lora_rank} and "
            f"{uniform.lora_alpha:g}, the rest {settings.r} and {settings.lora_alpha:g}"
            f"{' with rsLoRA' if settings.use_rslora else ''}. Use --format peft."
        )
    with replacing(path, earlier) as temporary:
        temporary.mkdir()
        write_safetensors(temporary / BUNDLE, _stacked_names(uniform), _stacked(uniform, torch.bfloat16), _FORMAT)
        if adapter.other_names:
            write_safetensors(temporary / SAFETENSORS, list(_other_names(adapter)), _others(adapter), _FORMAT)
        _write_config(temporary, config)
        base = settings.raw.get("base_model_name_or_path")
        write_manifest(temporary, base, uniform.lora_rank, uniform.lora_alpha)


def write_sglang(uniform: Uniform, path: Path, earlier: str | None = None) -> None:
    """Format F: every expert's tensors without PEFT's prefix, and nothing else."""
    _write_directory(path, _per_expert_names(uniform, ""), _per_expert(uniform, ""), _expert_config(uniform), earlier)


def write_sglang_merged(uniform: Uniform, path: Path, earlier: str | None = None) -> None:
    """Experts and the other LoRA pairs in one directory with one rank and one alpha, since SGLang has no patterns and no rsLoRA.

    Raises:
        KTAdapterError: There is no other tensor, or one that is not half of a LoRA pair (DoRA, biases, saved modules).
    """
    rest = UniformRest(uniform.adapter)
    rank = max(uniform.lora_rank, rest.rank)
    uniform = replace(uniform, lora_rank=rank, lora_alpha=uniform.lora_alpha / uniform.lora_rank * rank)
    names = [*rest.names, *_per_expert_names(uniform, PEFT_PREFIX)]
    tensors = chain(rest.tensors(rank, uniform.lora_alpha), _per_expert(uniform, PEFT_PREFIX))
    targets = sorted(rest.targets | set(MLP_TARGETS))
    _write_directory(path, names, tensors, {**_expert_config(uniform), "target_modules": targets}, earlier)


def write_sglang_rest(adapter: Adapter, path: Path) -> None:
    """All LoRA pairs but the routed experts' with one rank and one alpha, for SGLang's own LoRA.

    Raises:
        KTAdapterError: There is no such tensor, or one that is not half of a LoRA pair.
    """
    rest = UniformRest(adapter)
    alpha = adapter.settings.lora_alpha / adapter.settings.r * rest.rank
    config = _config(adapter, r=rest.rank, lora_alpha=alpha, target_modules=sorted(rest.targets), **_NOTHING_ELSE)
    _write_directory(path, rest.names, rest.tensors(rest.rank, alpha), config)


WRITERS: dict[str, Callable[[Uniform, Path, str | None], None]] = {
    "peft": write_peft,
    "kt-bundle": write_bundle,
    "sglang": write_sglang,
    "sglang-merged": write_sglang_merged,
}
"""layout of a directory -> its writer; the last argument as in :func:`~..ground.atomic_output.check_free`"""


def _write_directory(
    path: Path, names: list[str], tensors: Tensors, config: dict[str, Any], earlier: str | None = None
) -> None:
    with replacing(path, earlier) as temporary:
        temporary.mkdir()
        write_safetensors(temporary / SAFETENSORS, names, tensors, _FORMAT)
        _write_config(temporary, config)


def _write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _metadata(uniform: Uniform) -> dict[str, Any]:
    shape = next(iter(uniform.shapes.values()))
    return {
        "lora_rank": uniform.lora_rank,
        "lora_alpha": uniform.lora_alpha,
        "num_experts": uniform.num_experts,
        "num_layers": uniform.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
    }


# The names of a layout's tensors must be known before the tensors are read, so each pair of functions goes together.


def _stacked_names(uniform: Uniform) -> list[str]:
    return [f"layers.{number}.experts.{part}" for number in uniform.numbers for part in PARTS]


def _stacked(uniform: Uniform, dtype: torch.dtype | None = None) -> Tensors:
    for number, layer in uniform.layers():
        for part, tensor in layer.items():
            yield f"layers.{number}.experts.{part}", tensor.to(dtype) if dtype else tensor


def _expert_name(prefix: str, layer: int, expert: int, part: str) -> str:
    projection, _, side = part.partition("_lora_")
    return f"{prefix}model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.lora_{side.upper()}.weight"


def _per_expert_names(uniform: Uniform, prefix: str) -> list[str]:
    return [
        _expert_name(prefix, number, expert, part)
        for number in uniform.numbers
        for expert in range(uniform.shapes[number].num_experts)
        for part in PARTS
    ]


def _per_expert(uniform: Uniform, prefix: str) -> Tensors:
    for number, layer in uniform.layers():
        for part, stacked in layer.items():
            for expert, tensor in enumerate(stacked):
                yield _expert_name(prefix, number, expert, part), tensor


def _other_names(adapter: Adapter) -> dict[str, str]:
    """PEFT's name -> the adapter's own, of the tensors that are not of routed experts."""
    return {f"{PEFT_PREFIX}{'.'.join(split_module(name))}": name for name in adapter.other_names}


def _others(adapter: Adapter) -> Tensors:
    for name, own in _other_names(adapter).items():
        yield name, adapter.read(own)


_NOTHING_ELSE: dict[str, Any] = {
    "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
    "trainable_token_indices": None,
}  # fmt: skip
"""the keys of a configuration that could change a scaling, besides ``r`` and ``lora_alpha``, or that speak of other tensors"""


def _config(adapter: Adapter, **changes: Any) -> dict[str, Any]:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", **adapter.settings.raw}
    weights = [name for name in adapter.settings.target_parameters if name.endswith(".weight")]  # not the experts' own
    return {**config, "target_parameters": weights or None, **changes}


def _expert_config(uniform: Uniform) -> dict[str, Any]:
    """A configuration of the experts alone."""
    ranks = {"r": uniform.lora_rank, "lora_alpha": uniform.lora_alpha}
    return _config(uniform.adapter, **ranks, target_modules=list(MLP_TARGETS), **_NOTHING_ELSE)


def _whole_config(uniform: Uniform) -> dict[str, Any]:
    """A configuration of the experts and the other tensors in one file."""
    adapter, settings = uniform.adapter, uniform.adapter.settings
    if not adapter.other_names:
        return _expert_config(uniform)
    targets = settings.target_modules
    if not isinstance(targets, list):
        targets = [split_module(name)[0].rpartition(".")[2] for name in adapter.other_names]
    ranks, alphas = _without_experts(settings.rank_pattern), _without_experts(settings.alpha_pattern)
    own = (uniform.lora_rank, uniform.lora_alpha)
    if settings.use_rslora or own != (settings.r, settings.lora_alpha) or ranks or alphas:
        # First in the pattern, since PEFT takes the first match, and a bare name may match experts and other modules.
        experts = r"(.*\.)?experts\.\d+\.(gate|up|down)_proj"
        root = uniform.lora_rank**0.5 if settings.use_rslora else uniform.lora_rank
        ranks = {experts: uniform.lora_rank, **ranks}
        alphas = {experts: uniform.lora_alpha / uniform.lora_rank * root, **alphas}
    targets = sorted({*targets, *MLP_TARGETS})
    return _config(adapter, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)


def _without_experts(pattern: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in pattern.items() if "experts" not in name.replace("shared_expert", "")}
