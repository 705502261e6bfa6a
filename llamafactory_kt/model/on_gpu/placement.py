"""Which experts are on the GPU (``kt_gpu_experts``): how many fit, which ones, and when they are exchanged for others."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...adapters import AdapterSet
from ...checkpoint.discovery import ExpertsModule
from ...checkpoint.layout import Stored
from ...engines import gpus
from ...engines.base import Engine
from ...ground.errors import KTConfigError, KTMemoryError
from ...ground.machine import gib
from ..lock import ModelLock
from .split_experts import SplitExperts

logger = logging.getLogger(__name__)

AUTO = "auto"
CONTEXT = 8192
"""tokens for whose cache ``auto`` leaves room"""
MARGIN = 2**30
"""bytes that ``auto`` leaves on each GPU: work memory, and PEFT's part of an adapter"""
FIRST = 256
"""tokens after which the most used experts take the place of the first ones; they are chosen again each time that the number has doubled"""


def expert_itemsize(engine: type[Engine], stored: Stored, dtype: torch.dtype) -> float:
    """Bytes of a weight on the GPU.

    Args:
        stored: as the engine reads the weights.
        dtype: that the model computes in.
    """
    if engine.weights_dtype is not None:
        return engine.weights_dtype.itemsize
    packed = engine.bits is not None or stored.itemsize < torch.bfloat16.itemsize
    return dtype.itemsize if packed else stored.itemsize


@dataclass(frozen=True)
class GpuNeed:
    """What a model takes of the GPUs together, in bytes."""

    each: int
    """one expert of each layer, with its LoRA"""
    others: int
    """all but routed experts"""
    cache: int
    """keys and values of :data:`CONTEXT` tokens"""

    @classmethod
    def of(
        cls, config: Any, experts: Sequence[ExpertsModule], adapters: Sequence[AdapterSet], itemsize: float, others: int, dtype: torch.dtype
    ) -> GpuNeed:  # fmt: skip
        """Add up a model that is still empty.

        Args:
            config: the model's.
            adapters: whose LoRA the experts get, one after the other; all stay there.
            itemsize: as :func:`expert_itemsize`.
            dtype: of the cache.
        """
        each = 0
        for module in experts:
            sizes = [module.shape.projection(name) for name in module.shape.projections]
            rank, biased = sum(one.rank(module.layer) for one in adapters), module.formula.has_biases
            each += int(sum(
                rows * width * itemsize + 4 * (rank * (rows + width) + rows * biased) for rows, width in sizes
            ))  # fmt: skip
        return cls(each, others, CONTEXT * _cached_values(config.get_text_config()) * dtype.itemsize)

    def count(self, wanted: int | str, most: int, devices: Sequence[torch.device]) -> int:
        """How many experts of each layer go to the GPU.

        Args:
            wanted: a number, or :data:`AUTO` for as many as fit.
            most: experts of a layer.

        Raises:
            KTConfigError: A layer does not have so many.
            KTMemoryError: There is too little memory for the model and so many experts.
        """
        free = sum(map(gpus.free_memory, devices))
        fitting = max(0, min(most, (free - self.others - self.cache - MARGIN * len(devices)) // self.each))
        if wanted == AUTO:
            if not fitting:
                logger.warning(
                    "kt_gpu_experts: auto: no expert fits beside %s of the model, %s for the cache of %d tokens and a margin of %s; %s are free.",
                    gib(self.others), gib(self.cache), CONTEXT, gib(MARGIN), gib(free),
                )  # fmt: skip
            return fitting
        wanted = int(wanted)
        if wanted > most:
            raise KTConfigError(f"kt_gpu_experts: {wanted} are more than the {most} experts that a layer has.")
        if wanted * self.each + self.others > free:
            raise KTMemoryError(
                f"kt_gpu_experts: {wanted} experts of each layer need {gib(wanted * self.each)} on the GPU, and the rest of the model "
                f"{gib(self.others)}; {gib(free)} are free. kt_gpu_experts: auto would take {fitting}."
            )
        return wanted


def _cached_values(config: Any) -> int:
    """Keys and values of one token, of all layers: at most, as some layers may keep fewer."""
    heads, of_head = config.num_attention_heads, getattr(config, "qk_nope_head_dim", None)
    if of_head is not None:  # latent attention, whose cache keeps all heads on a GPU
        return int(config.num_hidden_layers * heads * (of_head + config.qk_rope_head_dim + config.v_head_dim))
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * 2 * width)


class Placement:
    """The experts of a model that are on a GPU. What the layers' routers choose is counted all along."""

    def __init__(self) -> None:
        self.layers: list[SplitExperts] = []
        self.counted = 0
        """tokens by which the experts there were chosen"""

    def add(self, layer: SplitExperts) -> None:
        """Take a layer, whose experts have just been placed."""
        self.layers.append(layer)
        self.counted = self._tokens

    def exchange_if_due(self, lock: ModelLock) -> None:
        """Between two generations: choose the most used experts, if enough tokens have been counted since, and nobody generates."""
        if self.layers and self._tokens >= max(FIRST, 2 * self.counted):
            lock.alone_if_idle(self._exchange)

    def _exchange(self) -> None:
        self.counted = self._tokens
        _wait_for({layer.device for layer in self.layers})
        for layer in self.layers:
            layer.place(layer.usage.most_used(layer.count))
        _wait_for({layer.device for layer in self.layers})
        logger.info("The GPU now has the %d most used experts of each layer, of %d tokens.", self._count, self.counted)

    @property
    def _tokens(self) -> int:
        return min(layer.usage.tokens for layer in self.layers)

    @property
    def _count(self) -> int:
        return max(layer.count for layer in self.layers)

    def describe(self) -> str:
        """For the load table."""
        if not self.layers:
            return "none"
        chosen = (
            f"the most used of {self.counted} tokens"
            if self.counted
            else f"the first; after {FIRST} tokens the most used"
        )
        return f"{self._count} of each of {len(self.layers)} layers, {chosen}"


def _wait_for(devices: Iterable[torch.device]) -> None:
    """Until no stream of these GPUs has work."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def by_device(layers: Iterable[SplitExperts]) -> dict[str, int]:
    """Bytes of their experts for each type of device."""
    sizes: dict[str, int] = {}
    for layer in layers:
        sizes[layer.device.type] = sizes.get(layer.device.type, 0) + layer.nbytes
    return sizes
