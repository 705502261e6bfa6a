"""Bytes that a model's weights take: in its checkpoint, in CPU memory, for each token; and whether all configurations fit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ...checkpoint.discovery import ExpertsModule, find_experts
from ...checkpoint.opening import weight_files
from ...engines.registry import AUTO, find_engine
from ...ground.errors import KTMemoryError
from ...ground.machine import available_memory, gib
from ...ground.tensors.stores import SafetensorsStore
from ...model.memory import nbytes_by_device
from ...model.state import has_kt_experts, kt_state
from .configs import BenchConfig
from .speed import BANDWIDTH_BUFFER

PROCESS_OVERHEAD = 2**29
"""bytes that a process takes besides the weights: torch, transformers, buffers, a conversation"""


class CheckpointBytes(NamedTuple):
    """Bytes of a checkpoint's tensors."""

    experts: int
    """routed experts"""
    others: int
    layer: int
    """the largest layer's experts, which a load holds beside the packed ones"""

    @property
    def total(self) -> int:
        """All tensors."""
        return self.experts + self.others

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> CheckpointBytes:
        """Add up tensors, by their names in the checkpoint."""
        layers: Counter[str] = Counter()
        for name, size in sizes.items():
            before, experts, _ = name.partition(".experts.")
            layers[before if experts else ""] += size
        others = layers.pop("", 0)
        return cls(layers.total(), others, max(layers.values(), default=0))


def checkpoint_bytes(model: str) -> CheckpointBytes | None:
    """Read a local checkpoint's headers; None if there is no local checkpoint."""
    files = weight_files(model)
    if not files:
        return None
    return CheckpointBytes.of({name: info.nbytes for name, info in SafetensorsStore(files[0], files).infos.items()})


def check_fit(configs: Sequence[BenchConfig], weights: CheckpointBytes, gpu_memory: int) -> dict[str, int]:
    """Check that all configurations fit into CPU memory together.

    Args:
        gpu_memory: bytes of all GPUs, 0 without any.

    Returns:
        name -> bytes of each configuration's weights, without what an earlier one has mapped already.

    Raises:
        KTMemoryError: They need more than is free.
    """
    needs: dict[str, int] = {}
    shared = 0
    for config in configs:
        need = _need(config, weights, gpu_memory)
        if _maps(config):  # all of these map the same files
            need, shared = max(0, need - shared), max(need, shared)
        needs[config.name] = need
    beside = BANDWIDTH_BUFFER + weights.layer + PROCESS_OVERHEAD * (len(configs) + 1)
    if (total := sum(needs.values()) + beside) > (free := available_memory()):
        each = ", ".join(f"{name} {gib(size)}" for name, size in needs.items())
        raise KTMemoryError(
            f"All configurations are in memory together, and take {gib(total)} ({each}, {gib(beside)} for their processes, the "
            f"layer being read and the bandwidth measurement); {gib(free)} are free. Measure fewer at once (--no-base, fewer "
            "--against), let them share mapped weights (kt_load=mmap), or take a smaller model."
        )
    return needs


def _maps(config: BenchConfig) -> bool:
    if config.stock or config.config.get("kt_load") != "mmap":
        return False
    engine = find_engine(config.config.get("kt_backend", AUTO))
    return engine is None or engine.maps_weights


def _need(config: BenchConfig, weights: CheckpointBytes, gpu_memory: int) -> int:
    if config.stock or not config.config.get("use_kt"):
        return max(0, weights.total - gpu_memory)  # what the GPUs do not hold is offloaded to the CPU
    engine = find_engine(config.config.get("kt_backend", AUTO))
    bits = engine.bits if engine is not None and engine.bits is not None else 16
    return weights.experts * bits // 16 + (0 if gpu_memory else weights.others)


def warm_page_cache(model: str) -> int:
    """Read a local checkpoint once, so that every load finds it in the page cache; skipped if it would not fit there.

    Returns:
        The checkpoint's bytes, 0 if there is no local one.
    """
    files = weight_files(model)
    total = sum(file.stat().st_size for file in files)
    if total < available_memory() // 2:
        for file in files:
            with file.open("rb", buffering=0) as handle:
                os.posix_fadvise(
                    handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL
                )  # read ahead by large pages, where there are
                while handle.read(2**24):
                    pass
    return total


class ModelBytes(NamedTuple):
    """Bytes of a loaded model's weights in CPU memory, as in :class:`~.results.LoadStats`."""

    weights: int
    experts_per_token: int
    others_per_token: int
    lora_per_token: int

    @classmethod
    def of(cls, model: Any) -> ModelBytes:
        """Measure a model with KT experts, or one of stock transformers."""
        others, experts, lora, per_token = _in_cpu_memory(model), 0, 0, 0
        lora_per_token = beside = sum(_in_cpu_memory(part) for layer in model.modules() for part in _lora_of(layer))
        if has_kt_experts(model):
            for wrapper in kt_state(model).wrappers:
                experts += wrapper.engine.nbytes
                per_token += active(wrapper.engine.nbytes, wrapper.info)
                lora += wrapper.engine.lora_nbytes
                lora_per_token += active(wrapper.engine.lora_nbytes, wrapper.info)
        else:
            for info in find_experts(model):
                module = model.get_submodule(info.name)
                size = _in_cpu_memory(module)
                offloaded = any(parameter.is_meta for parameter in module.parameters())
                experts += size
                per_token += size if offloaded else active(size, info)
            others -= experts
        embedding = model.get_input_embeddings()
        tied = embedding.weight is getattr(model.get_output_embeddings(), "weight", None)
        every_token = others - beside - (0 if tied else _in_cpu_memory(embedding))
        return cls(experts + lora + others, per_token, every_token, lora_per_token)


def _lora_of(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The factors that PEFT has put beside a layer."""
    return (layer.lora_A, layer.lora_B) if isinstance(layer, LoraLayer) else ()


def cache_bytes(cache: Any) -> int:
    """Bytes of CPU memory that the keys and values of a conversation take, or what a model keeps instead of them."""
    return sum(kept.nbytes for layer in cache.layers for kept in kept_by(layer) if kept.device.type == "cpu")


def kept_by(layer: Any) -> list[torch.Tensor]:
    """What one layer of a cache keeps: its keys and values, or what it has instead."""
    kept = [layer.keys, layer.values] if getattr(layer, "keys", None) is not None else vars(layer).values()
    return [states for states in kept if isinstance(states, torch.Tensor)]


def _in_cpu_memory(module: nn.Module) -> int:
    """Weights on the meta device count too: accelerate keeps them on the CPU and copies them to a GPU for each forward."""
    sizes = nbytes_by_device(module)
    return sizes.get("cpu", 0) + sizes.get("meta", 0)


def active(size: int, info: ExpertsModule) -> int:
    """The part of all experts' bytes that one token's experts have."""
    return size * info.num_experts_per_tok // info.shape.num_experts
