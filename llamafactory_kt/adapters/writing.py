"""Writing adapters, one writer a layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..ground.atomic_output import replacing
from ..ground.errors import KTAdapterError, name_some
from ..ground.tensor_files import SAFETENSORS
from ..ground.tensor_writer import write_moe_lora_file, write_safetensors
from .adapter import Adapter
from .config import CONFIG
from .keys import PEFT_PREFIX, PROJECTIONS, split_module
from .stacked import BUNDLE, MANIFEST
from .uniform import Uniform, narrowed

EXPERT_TARGETS = ["gate_proj", "up_proj", "down_proj"]


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


Named = Iterator[tuple[str, torch.Tensor]]


def write_moe_lora(uniform: Uniform, path: Path) -> None:
    """``moe_lora.pt`` (format E): the routed experts only."""
    with replacing(path) as temporary:
        layers = ((f"layer_{number}", tensors) for number, tensors in uniform.layers())
        write_moe_lora_file(temporary, _metadata(uniform), layers)


def _stacked_names(uniform: Uniform) -> list[str]:
    parts = [f"{projection}_lora_{side}" for projection in PROJECTIONS for side in "ab"]
    return [f"layers.{number}.experts.{part}" for number in uniform.numbers for part in parts]


def _stacked(uniform: Uniform, dtype: torch.dtype | None = None) -> Named:
    for number, layer in uniform.layers():
        for part, tensor in layer.items():
            yield f"layers.{number}.experts.{part}", tensor.to(dtype) if dtype else tensor


def write_stacked(uniform: Uniform, path: Path) -> None:
    """One safetensors file with a KT bundle's stacked tensors; rank, alpha and sizes are its metadata."""
    metadata = {name: str(value) for name, value in _metadata(uniform).items()}
    with replacing(path) as temporary:
        write_safetensors(temporary, _stacked_names(uniform), _stacked(uniform), metadata)


def _expert_name(layer: int, expert: int, projection: str, side: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.lora_{side.upper()}.weight"


def _per_expert_names(uniform: Uniform, prefix: str) -> list[str]:
    return [
        prefix + _expert_name(number, expert, projection, side)
        for number in uniform.numbers
        for expert in range(uniform.shapes[number].num_experts)
        for projection in PROJECTIONS
        for side in "ab"
    ]


def _per_expert(uniform: Uniform, prefix: str) -> Named:
    for number, layer in uniform.layers():
        for projection in PROJECTIONS:
            for side in "ab":
                for expert, tensor in enumerate(layer[f"{projection}_lora_{side}"]):
                    yield prefix + _expert_name(number, expert, projection, side), tensor


def _other_names(adapter: Adapter) -> dict[str, str]:
    """PEFT's name -> the adapter's own, of the tensors that are not of routed experts."""
    return {f"{PEFT_PREFIX}{'.'.join(split_module(name))}": name for name in adapter.other_names}


def _others(adapter: Adapter) -> Named:
    for name, own in _other_names(adapter).items():
        yield name, adapter.read(own)


_NOTHING_ELSE: dict[str, Any] = {
    "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
}  # fmt: skip
"""what else in a configuration could change a scaling"""


def _config(adapter: Adapter, **changes: Any) -> dict[str, Any]:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", **adapter.settings.raw}
    return {**config, "target_parameters": None, **changes}


def _expert_config(uniform: Uniform) -> dict[str, Any]:
    """A config of the experts alone: one rank, one alpha, nothing else that could change their scaling."""
    ranks = {"r": uniform.lora_rank, "lora_alpha": uniform.lora_alpha}
    return _config(uniform.adapter, **ranks, target_modules=EXPERT_TARGETS, **_NOTHING_ELSE)


def _whole_config(uniform: Uniform) -> dict[str, Any]:
    """A config for experts and the rest in one file."""
    settings, targets = uniform.adapter.settings, uniform.adapter.settings.target_modules
    names = (
        targets
        if isinstance(targets, list)
        else sorted({m.rpartition(".")[2] for m in _other_modules(uniform.adapter)})
    )
    changes: dict[str, Any] = {"target_modules": sorted({*names, *EXPERT_TARGETS})}
    ranks, alphas = _without_experts(settings.rank_pattern), _without_experts(settings.alpha_pattern)
    own = (uniform.lora_rank, uniform.lora_alpha)
    if not uniform.adapter.other_names:
        return _expert_config(uniform)
    if settings.use_rslora or own != (settings.r, settings.lora_alpha) or ranks or alphas:
        # First in the pattern, since PEFT takes the first that matches: a bare name may mean experts and others alike.
        experts = r"(.*\.)?experts\.\d+\.(gate|up|down)_proj"
        root = uniform.lora_rank**0.5 if settings.use_rslora else uniform.lora_rank
        ranks = {experts: uniform.lora_rank, **ranks}
        alphas = {experts: uniform.lora_alpha / uniform.lora_rank * root, **alphas}
    return _config(uniform.adapter, **changes, rank_pattern=ranks, alpha_pattern=alphas)


def _without_experts(pattern: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in pattern.items() if "experts" not in name.replace("shared_expert", "")}


def _other_modules(adapter: Adapter) -> set[str]:
    return {split_module(name)[0] for name in adapter.other_names}


def _write_tensors(path: Path, names: list[str], tensors: Named) -> None:
    write_safetensors(path, names, tensors, {"format": "pt"})


def _write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def write_peft(uniform: Uniform, path: Path) -> None:
    """Format B: one tensor pair per expert and projection, with all other tensors, in PEFT's names."""
    names = [*_other_names(uniform.adapter), *_per_expert_names(uniform, PEFT_PREFIX)]
    with replacing(path) as temporary:
        temporary.mkdir()
        tensors = chain(_others(uniform.adapter), _per_expert(uniform, PEFT_PREFIX))
        _write_tensors(temporary / SAFETENSORS, names, tensors)
        _write_config(temporary, _whole_config(uniform))


def write_bundle(uniform: Uniform, path: Path) -> None:
    """Format C: stacked experts in bfloat16 beside the rest, and a manifest with checksums.

    Raises:
        KTAdapterError: The rest has another rank or alpha than the experts: a bundle has one config for both.
    """
    settings, adapter = uniform.adapter.settings, uniform.adapter
    config = _expert_config(uniform) if not adapter.other_names else _config(adapter)
    if (config["r"], config["lora_alpha"]) != (uniform.lora_rank, uniform.lora_alpha) or settings.use_rslora:
        raise KTAdapterError(
            f"A KT bundle has one rank and one alpha for experts and the rest: the experts have {uniform.lora_rank} and "
            f"{uniform.lora_alpha:g}, the rest {settings.r} and {settings.lora_alpha:g}"
            f"{' with rsLoRA' if settings.use_rslora else ''}. Use --format peft."
        )
    with replacing(path) as temporary:
        temporary.mkdir()
        _write_tensors(temporary / BUNDLE, _stacked_names(uniform), _stacked(uniform, torch.bfloat16))
        if adapter.other_names:
            _write_tensors(temporary / SAFETENSORS, list(_other_names(adapter)), _others(adapter))
        _write_config(temporary, config)
        artifacts: dict[str, Any] = {}
        for file in sorted(temporary.iterdir()):
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            artifacts[file.name] = {"size": file.stat().st_size, "sha256": digest}
        manifest = {
            "version": 1,
            "status": "ready",
            "base": {"model_name_or_path": settings.raw.get("base_model_name_or_path")},
            "lora": {"rank": uniform.lora_rank, "alpha": uniform.lora_alpha},
            "artifacts": artifacts,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def write_sglang(uniform: Uniform, path: Path) -> None:
    """Format F: every expert's tensors without PEFT's prefix, and nothing else."""
    with replacing(path) as temporary:
        temporary.mkdir()
        _write_tensors(temporary / SAFETENSORS, _per_expert_names(uniform, ""), _per_expert(uniform, ""))
        _write_config(temporary, _expert_config(uniform))


def write_sglang_merged(uniform: Uniform, path: Path) -> None:
    """Experts and the rest in one directory with one rank and one alpha: SGLang knows no patterns and no rsLoRA, so the
    rest is padded to the same rank and its scaling folded into B.

    Raises:
        KTAdapterError: There is no other tensor, or one that is not half of a LoRA pair (DoRA, biases, saved modules).
    """
    adapter, pairs = uniform.adapter, _other_pairs(uniform.adapter)
    rank = max(uniform.lora_rank, _largest_rank(adapter, pairs))
    uniform = replace(uniform, lora_rank=rank, lora_alpha=uniform.lora_alpha / uniform.lora_rank * rank)
    targets = sorted(_targets(pairs) | set(EXPERT_TARGETS))
    others = _padded_others(adapter, pairs, rank, uniform.lora_alpha)
    with replacing(path) as temporary:
        temporary.mkdir()
        tensors = chain(others, _per_expert(uniform, PEFT_PREFIX))
        _write_tensors(temporary / SAFETENSORS, [*_halves(pairs), *_per_expert_names(uniform, PEFT_PREFIX)], tensors)
        _write_config(temporary, {**_expert_config(uniform), "target_modules": targets})


def write_sglang_rest(adapter: Adapter, path: Path) -> None:
    """All but the routed experts with one rank and one alpha, for SGLang's own LoRA.

    Raises:
        KTAdapterError: There is no such tensor, or one that is not half of a LoRA pair.
    """
    pairs = _other_pairs(adapter)
    rank = _largest_rank(adapter, pairs)
    alpha = adapter.settings.lora_alpha / adapter.settings.r * rank
    config = _config(adapter, r=rank, lora_alpha=alpha, target_modules=sorted(_targets(pairs)), **_NOTHING_ELSE)
    with replacing(path) as temporary:
        temporary.mkdir()
        _write_tensors(temporary / SAFETENSORS, _halves(pairs), _padded_others(adapter, pairs, rank, alpha))
        _write_config(temporary, config)


def _largest_rank(adapter: Adapter, pairs: dict[str, tuple[str, str]]) -> int:
    return max(adapter.store.infos[a].shape[0] for a, _ in pairs.values())


def _targets(pairs: dict[str, tuple[str, str]]) -> set[str]:
    return {module.rpartition(".")[2] for module in pairs}


def _halves(pairs: dict[str, tuple[str, str]]) -> list[str]:
    return [f"{PEFT_PREFIX}{module}.lora_{side}.weight" for module in pairs for side in "AB"]


def _other_pairs(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """module -> A and B of the tensors that are not of routed experts."""
    parts: dict[str, dict[str, str]] = {}
    for name in adapter.other_names:
        module, part = split_module(name)
        parts.setdefault(module, {})[part] = name
    halves = ("lora_A.weight", "lora_B.weight")
    wrong = [name for own in parts.values() if set(own) != set(halves) for name in own.values()]
    if wrong or not parts:
        found = (
            f"{len(wrong)} tensors that are not, first {name_some(wrong, 2)}" if wrong else "none besides the experts'"
        )
        raise KTAdapterError(
            f"{adapter.store.path}: for SGLang (--format sglang-merged) there must be LoRA pairs besides the experts; found {found}."
        )
    return {module: (own[halves[0]], own[halves[1]]) for module, own in parts.items()}


def _padded_others(adapter: Adapter, pairs: dict[str, tuple[str, str]], rank: int, alpha: float) -> Named:
    common = alpha / rank
    for module, (name_a, name_b) in pairs.items():
        a, b = adapter.read(name_a), adapter.read(name_b)
        factor = adapter.settings.scaling(module, a.shape[0]) / common
        extra = rank - a.shape[0]
        folded = b if factor == 1 else narrowed(b.float() * factor, b.dtype)
        yield f"{PEFT_PREFIX}{module}.lora_A.weight", torch.nn.functional.pad(a, (0, 0, 0, extra))
        yield f"{PEFT_PREFIX}{module}.lora_B.weight", torch.nn.functional.pad(folded, (0, extra))


WRITERS: dict[str, Callable[[Uniform, Path], None]] = {
    "peft": write_peft,
    "kt-bundle": write_bundle,
    "sglang": write_sglang,
    "sglang-merged": write_sglang_merged,
}
