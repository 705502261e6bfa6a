"""Writing adapters: always under a temporary name that is renamed when all is there, so that no part stays behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import KTAdapterError, name_some
from .adapter import Adapter
from .config import CONFIG
from .keys import PEFT_PREFIX, PROJECTIONS, split_module
from .stacked import BUNDLE, MANIFEST
from .store import SAFETENSORS
from .uniform import Uniform

EXPERT_TARGETS = ["gate_proj", "up_proj", "down_proj"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; renamed to it at the end, removed on any error.

    Raises:
        KTAdapterError: ``path`` is a directory that is not empty.
    """
    if path.is_dir() and any(path.iterdir()):
        raise KTAdapterError(f"{path} exists and is not empty; choose another output or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary / path.name
        _share(temporary / path.name)
        if path.is_dir():
            path.rmdir()
        os.replace(temporary / path.name, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _share(path: Path) -> None:
    """Give files the permissions of any new file; safetensors makes them readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else path.iterdir():
        file.chmod(0o666 & ~mask)


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


def write_moe_lora(uniform: Uniform, path: Path) -> None:
    """``moe_lora.pt`` (format E): the routed experts only."""
    with replacing(path) as temporary:
        layers: dict[str, Any] = {f"layer_{number}": tensors for number, tensors in uniform.layers()}
        torch.save({"metadata": _metadata(uniform), **layers}, temporary)


def _bundle_tensors(uniform: Uniform) -> dict[str, torch.Tensor]:
    return {f"layers.{n}.experts.{part}": t.contiguous() for n, layer in uniform.layers() for part, t in layer.items()}


def write_stacked(uniform: Uniform, path: Path) -> None:
    """One safetensors file with a KT bundle's stacked tensors; rank, alpha and sizes are its metadata."""
    with replacing(path) as temporary:
        save_file(_bundle_tensors(uniform), temporary, {name: str(value) for name, value in _metadata(uniform).items()})


def _per_expert(uniform: Uniform, prefix: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for number, layer in uniform.layers():
        for projection in PROJECTIONS:
            for side in "ab":
                for expert, tensor in enumerate(layer[f"{projection}_lora_{side}"]):
                    name = f"{prefix}model.layers.{number}.mlp.experts.{expert}.{projection}_proj.lora_{side.upper()}.weight"
                    tensors[name] = tensor.clone()
    return tensors


def _others(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The tensors that are not of routed experts, under PEFT's names."""
    return {f"{PEFT_PREFIX}{'.'.join(split_module(name))}": adapter.read(name) for name in adapter.other_names}


def _config(uniform: Uniform, **changes: Any) -> dict[str, Any]:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", **uniform.adapter.settings.raw}
    return {**config, "target_parameters": None, **changes}


def _expert_config(uniform: Uniform) -> dict[str, Any]:
    """A config of the experts alone: one rank, one alpha, nothing else that could change their scaling."""
    return _config(
        uniform, r=uniform.lora_rank, lora_alpha=uniform.lora_alpha, use_rslora=False, use_dora=False, rank_pattern={},
        alpha_pattern={}, target_modules=EXPERT_TARGETS, modules_to_save=None,
    )  # fmt: skip


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
    return _config(uniform, **changes, rank_pattern=ranks, alpha_pattern=alphas)


def _without_experts(pattern: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in pattern.items() if "experts" not in name.replace("shared_expert", "")}


def _other_modules(adapter: Adapter) -> set[str]:
    return {split_module(name)[0] for name in adapter.other_names}


def _write_directory(path: Path, files: dict[str, dict[str, torch.Tensor]], config: dict[str, Any]) -> None:
    path.mkdir()
    for name, tensors in files.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / name, {"format": "pt"})
    (path / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def write_peft(uniform: Uniform, path: Path) -> None:
    """Format B: one tensor pair per expert and projection, with all other tensors, in PEFT's names."""
    with replacing(path) as temporary:
        tensors = {**_others(uniform.adapter), **_per_expert(uniform, PEFT_PREFIX)}
        _write_directory(temporary, {SAFETENSORS: tensors}, _whole_config(uniform))


def write_bundle(uniform: Uniform, path: Path) -> None:
    """Format C: stacked experts in bfloat16 beside the rest, and a manifest with checksums.

    Raises:
        KTAdapterError: The rest has another rank or alpha than the experts: a bundle has one config for both.
    """
    settings, adapter = uniform.adapter.settings, uniform.adapter
    config = _expert_config(uniform) if not adapter.other_names else _config(uniform)
    if (config["r"], config["lora_alpha"]) != (uniform.lora_rank, uniform.lora_alpha) or settings.use_rslora:
        raise KTAdapterError(
            f"A KT bundle has one rank and one alpha for experts and the rest: the experts have {uniform.lora_rank} and "
            f"{uniform.lora_alpha:g}, the rest {settings.r} and {settings.lora_alpha:g}"
            f"{' with rsLoRA' if settings.use_rslora else ''}. Use --format peft."
        )
    with replacing(path) as temporary:
        stacked = {name: tensor.to(torch.bfloat16) for name, tensor in _bundle_tensors(uniform).items()}
        files = {BUNDLE: stacked, **({SAFETENSORS: _others(adapter)} if adapter.other_names else {})}
        _write_directory(temporary, files, config)
        artifacts: dict[str, Any] = {}
        for file in sorted(temporary.iterdir()):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
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
        _write_directory(temporary, {SAFETENSORS: _per_expert(uniform, "")}, _expert_config(uniform))


def write_sglang_merged(uniform: Uniform, path: Path) -> None:
    """Experts and the rest in one directory with one rank and one alpha: SGLang knows no patterns and no rsLoRA, so the
    rest is padded to the same rank and its scaling folded into B.

    Raises:
        KTAdapterError: There is no other tensor, or one that is not half of a LoRA pair (DoRA, biases, saved modules).
    """
    adapter, rank = uniform.adapter, uniform.lora_rank
    pairs: dict[str, dict[str, str]] = {}
    for name in adapter.other_names:
        module, part = split_module(name)
        pairs.setdefault(module, {})[part] = name
    halves = {"lora_A.weight", "lora_B.weight"}
    wrong = [
        name for parts in pairs.values() for part, name in parts.items() if set(parts) != halves or part not in halves
    ]
    if wrong or not pairs:
        found = (
            f"{len(wrong)} tensors that are not, first {name_some(wrong, 2)}" if wrong else "none besides the experts'"
        )
        raise KTAdapterError(
            f"{adapter.store.path}: --format sglang-merged needs LoRA pairs besides the experts; found {found}."
        )
    ranks = {module: adapter.store.infos[parts["lora_A.weight"]].shape[0] for module, parts in pairs.items()}
    if max(ranks.values()) > rank:
        uniform = replace(
            uniform, lora_rank=max(ranks.values()), lora_alpha=uniform.lora_alpha / rank * max(ranks.values())
        )
        rank = uniform.lora_rank
    common = uniform.lora_alpha / rank
    tensors = _per_expert(uniform, PEFT_PREFIX)
    for module, parts in pairs.items():
        a, b = adapter.read(parts["lora_A.weight"]), adapter.read(parts["lora_B.weight"])
        factor = adapter.settings.scaling(module, a.shape[0]) / common
        folded = b if factor == 1 else b.float() * factor
        narrow = folded.to(b.dtype)
        folded = narrow if torch.equal(narrow.float(), folded.float()) else folded
        extra = rank - a.shape[0]
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, extra))
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = torch.nn.functional.pad(folded, (0, extra))
    targets = sorted({module.rpartition(".")[2] for module in pairs} | set(EXPERT_TARGETS))
    with replacing(path) as temporary:
        _write_directory(temporary, {SAFETENSORS: tensors}, {**_expert_config(uniform), "target_modules": targets})


WRITERS: dict[str, Callable[[Uniform, Path], None]] = {
    "peft": write_peft,
    "kt-bundle": write_bundle,
    "sglang": write_sglang,
    "sglang-merged": write_sglang_merged,
}
