"""What a lowered layer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..native.library import AttentionCall, ExpertsCall, Step


@dataclass
class CacheUse:
    """One update of the cache, and what reads it."""

    layer: int
    """index in the cache"""
    new: tuple[torch.Tensor, torch.Tensor]
    """keys and values of the new tokens, in the program's memory"""
    found: tuple[torch.Tensor, ...]
    """all keys and values, as they were recorded; empty when the program has been checked"""
    writes: tuple[Step, Step]
    """the steps that write the new rows"""
    attentions: list[AttentionCall] = field(default_factory=list)

    @property
    def values(self) -> torch.Tensor:
        """As attention reads them: where they have no width of their own, the first part of the keys."""
        keys, values = self.found
        return values if values.shape[-1] else keys


@dataclass
class Observation:
    """A function of Python's that looks at tensors, and may keep them."""

    function: Callable[..., None]
    tensors: list[torch.Tensor]

    def __call__(self) -> None:
        self.function(*(tensor.clone() for tensor in self.tensors))


@dataclass
class Program:
    """What a layer computes, ready to be run."""

    parts: list[Any]
    """lists of steps, and functions without arguments, in turn"""
    inputs: list[torch.Tensor | None]
    """where each tensor that the layer is called with goes; None where it is not read"""
    output: torch.Tensor
    caches: list[CacheUse]
    masks: list[AttentionCall]
    """the calls that read the mask of the layer's call"""
    experts: list[ExpertsCall]
    """the engines' own calls, whose LoRA may be exchanged"""
    kept: list[Any]
    """what the addresses in the steps are of"""
