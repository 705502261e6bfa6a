"""What engines are built with: options that all layers of a model share, and what one layer is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters import ExpertsShape
from ..checkpoint.expert_weights import ExpertBiases, ExpertWeights
from ..checkpoint.formula import PLAIN, ExpertFormula
from ..native.packed import PackedExpert


@dataclass(frozen=True)
class EngineOptions:
    """What all layers of a model share."""

    pools: int = 1
    """NUMA sub-pools that the weights are divided among"""
    max_chunk: int = 512
    """tokens per kernel call; longer inputs are split"""
    packed_files: Path | None = None
    """directory of packed weights (``kt_weight_path``)"""
    verbose: bool = False
    """let the engine write to stdout while it loads"""
    mapped: bool = False
    """leave weights in the checkpoint's mapped files, where the engine can read them there"""
    dense_bits: int | None = None
    """of the weights of the linear layers around the experts; None for the checkpoint's own"""
    cache_bits: int | None = None
    """of the keys and values in the cache; None for the model's dtype"""


DEFAULT_OPTIONS = EngineOptions()
LOADS = ("auto", "mmap", "copy")
"""how weights get into memory; ``auto``: copied where memory is free, else mapped"""
DENSE = {"same": None, "int8": 8, "int4": 4}
"""what the linear layers around the experts are kept as: bits of a weight; None for the checkpoint's own"""
CACHES = {"same": None, "int8": 8}
"""what the cache keeps keys and values as: bits of a value; None for the model's dtype"""


@dataclass(frozen=True)
class EngineSpec:
    """One layer."""

    layer: int
    shape: ExpertsShape
    num_experts_per_tok: int
    lora_rank: int
    """rank to have room for; 0 where no LoRA is to come"""
    lora_scaling: float = 1.0
    """scaling most of the LoRA to come will have"""
    fingerprint: Callable[[], str] = str
    """computes what tells the checkpoint's weights of this layer from another version's"""
    formula: ExpertFormula = PLAIN
    """what each expert computes; one that :meth:`Engine.cannot_compute` accepts"""
    read_biases: Callable[[], ExpertBiases | None] = lambda: None
    """reads the layer's biases, where the formula has any"""
    read_packed: Callable[[], Iterable[PackedExpert] | None] = lambda: None
    """reads the layer's experts as :data:`ReadExperts` does, as the native kernels use them without decoding; None where they cannot,
    or where an adapter is merged"""


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that one layer takes."""

    weights: int
    lora: int
    loading: int
    """on top while the layer is loaded"""


ReadExperts = Callable[[torch.dtype | None], Iterable[ExpertWeights]]
"""Reads a layer's experts from its checkpoint in turn, in a dtype or, for None, in its own. Use or copy each one's weights
before asking for the next; those of mapped files, which ``options.mapped`` says they are, may be kept."""
