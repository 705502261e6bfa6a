"""Counts a model's bytes and operations, and divides them by what the machine does in a second.

Everything is counted as a load would: experts by the contract that their own class keeps, memory by the engines themselves, the layers that are
quantized by the rule that quantizes them, cache and operations by the model's own forward on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import psutil
import torch

from ...adapters import AdapterSet, open_adapters
from ...checkpoint.formats import format_of
from ...checkpoint.opening import MoEModel, empty_model, weight_files
from ...decoding.latent_attention import keep_latents, latents_of
from ...engines.base import Engine
from ...engines.native import ENGINES
from ...engines.onednn import OneDNNEngine
from ...engines.options import CACHES, DENSE
from ...ground.machine import available_memory, cgroup_memory
from ..bench.memory import PROCESS_OVERHEAD
from ..bench.results import ATTENTION, EXPERTS
from .forward import cache_bytes, prompt, silence_experts
from .results import CONTEXTS, PROMPT, Estimate, EstimatedModel, Row
from .source import find_configuration
from .speed import MachineSpeed, machine_speed
from .weights import (
    PLAIN,
    LoraBytes,
    Weights,
    dense_weights,
    disk_bytes,
    experts_weights,
    lora_bytes,
    parameters,
    stored_experts,
)


def estimate(model: str, adapter: str | Sequence[str] | None = None, *, measure_again: bool = False) -> Estimate:
    """Estimate a model on this machine. Its weights need not be there.

    Args:
        model: a folder, a ``config.json``, or a name on the hub.
        adapter: directory of an adapter, or several.
        measure_again: also where this machine's speed is known.

    Raises:
        KTPathError: There is no such model or adapter.
        KTModelError: The model has no routed experts, or such that no engine computes.
        KTAdapterError: The adapter is broken, or made for another model.
    """
    place = find_configuration(model)
    adapters = open_adapters(adapter)
    counted = _Counted.of(MoEModel(empty_model(place, quantized=True), weight_files(place)), adapters)
    gpus = range(torch.cuda.device_count())
    gpu_free = sum(torch.cuda.mem_get_info(number)[0] for number in gpus) if gpus else None
    whole = int(min(psutil.virtual_memory().total, cgroup_memory()))
    machine, free = machine_speed(measure_again), available_memory()
    rows = [*_on_cpu(counted, machine, free), *_with_gpu(counted, machine, free, gpu_free)]
    about = counted.about(model, ", ".join(str(one.directory) for one in adapters.adapters) or None)
    return Estimate(about, machine, whole, free, gpu_free, rows)


def engines() -> Sequence[type[Engine]]:
    """One for each precision of the experts, of those that run here."""
    return [engine for engine in ENGINES if engine.problem() is None] or [OneDNNEngine]


@dataclass(frozen=True)
class _Counted:
    """A model's bytes and operations."""

    opened: MoEModel
    form: Any
    """Format of the checkpoint"""
    experts: dict[type[Engine], Weights]
    dense: dict[str, Weights]
    """by the value of ``kt_dense``"""
    lora: dict[type[Engine], LoraBytes]
    cache: dict[str, dict[int, int]]
    """by the value of ``kt_cache``: tokens -> bytes"""
    gpu_cache: int
    """bytes on a GPU after the most tokens: keys and values, also of latent attention"""
    operations: dict[str, float]
    """part -> those of a prompt of :data:`PROMPT` tokens"""

    @classmethod
    def of(cls, opened: MoEModel, adapters: AdapterSet) -> _Counted:
        model, experts, usable = opened.model, opened.experts, engines()
        form = format_of(model.config)
        sizes = {engine: stored_experts(opened, form, engine.takes_packed).itemsize for engine in usable}
        lora = {engine: lora_bytes(opened, adapters, engine) for engine in usable}
        silence_experts(model, experts)
        after = {tokens: prompt(model, tokens) for tokens in dict.fromkeys((*CONTEXTS, PROMPT))}
        keep_latents(model)
        latents = latents_of(model)
        native = OneDNNEngine not in usable  # which alone reads integers
        return cls(
            opened,
            form,
            {engine: experts_weights(experts, engine, sizes[engine]) for engine in usable},
            {name: dense_weights(model, experts, bits) for name, bits in DENSE.items() if native or not bits},
            lora,
            {
                name: {tokens: cache_bytes(after[tokens][0], latents, int8=bool(bits)) for tokens in CONTEXTS}
                for name, bits in CACHES.items()
                if native or not bits
            },
            cache_bytes(after[CONTEXTS[-1]][0], {}, int8=False),
            dict(after[PROMPT][1]),
        )

    def about(self, name: str, adapter: str | None) -> EstimatedModel:
        """What does not depend on precisions."""
        model: Any = self.opened.model
        first = self.opened.experts[0]
        stored = (
            ", ".join(sorted(self.opened.layout.dtypes()))
            if self.opened.files
            else self.form.title
            if self.form.parts
            else ""
        )
        return EstimatedModel(
            name, type(model).__name__, model.config.get_text_config().num_hidden_layers, len(self.opened.experts),
            first.shape.num_experts, first.num_experts_per_tok, parameters(model), stored,
            disk_bytes(self.opened, self.form), bool(self.opened.files), adapter,
        )  # fmt: skip


def _on_cpu(counted: _Counted, machine: MachineSpeed, free: int) -> Iterator[Row]:
    for (engine, experts), (dense_name, dense), (cache_name, cache) in product(
        counted.experts.items(), counted.dense.items(), counted.cache.items()
    ):
        lora = counted.lora[engine]
        extra = lora.experts + lora.others
        cpu = experts.memory + dense.memory + extra + cache[CONTEXTS[-1]] + PROCESS_OVERHEAD
        seconds = _seconds(experts, machine) + _seconds(dense, machine) + lora.token / machine.reads
        read = sum((*experts.token.values(), *dense.token.values(), lora.token))
        dense_bits = DENSE[dense_name] or PLAIN
        computing = sum(
            count
            / machine.of(_bits(experts) if part == EXPERTS else PLAIN if part == ATTENTION else dense_bits).products
            for part, count in counted.operations.items()
        )
        reading = (experts.memory + dense.memory) / machine.reads
        yield Row(
            False, engine.name, dense_name, cache_name, experts.memory, dense.memory, extra, cache[CONTEXTS[-1]], cpu, 0, experts.loading,
            cpu + experts.loading <= free,
            {tokens: read + cache[tokens] for tokens in CONTEXTS},
            {tokens: 1 / (seconds + cache[tokens] / machine.reads) for tokens in CONTEXTS},
            PROMPT / max(computing, reading),
        )  # fmt: skip


def _with_gpu(counted: _Counted, machine: MachineSpeed, free: int, gpu_free: int | None) -> Iterator[Row]:
    """The CPU's part of the time alone, which is nearly all of it."""
    dense, cache = counted.dense["same"], counted.gpu_cache
    for engine, experts in counted.experts.items():
        lora = counted.lora[engine]
        cpu = experts.memory + lora.experts + PROCESS_OVERHEAD
        gpu = dense.memory + lora.others + cache
        experts_lora = lora.token - lora.others
        seconds = _seconds(experts, machine) + experts_lora / machine.reads
        read = sum(experts.token.values()) + experts_lora
        computing = counted.operations.get(EXPERTS, 0.0) / machine.of(_bits(experts)).products
        yield Row(
            True, engine.name, "same", "same", experts.memory, dense.memory, lora.experts + lora.others, cache, cpu, gpu,
            experts.loading, cpu + experts.loading <= free and gpu <= (gpu_free if gpu_free is not None else gpu),
            dict.fromkeys(CONTEXTS, read),
            dict.fromkeys(CONTEXTS, 1 / seconds),
            PROMPT / max(computing, experts.memory / machine.reads),
        )  # fmt: skip


def _seconds(weights: Weights, machine: MachineSpeed) -> float:
    """In which a token reads its part."""
    return sum(size / machine.of(bits).reads for bits, size in weights.token.items())


def _bits(weights: Weights) -> int:
    return next(iter(weights.token))
