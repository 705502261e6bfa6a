"""The routed experts as an operator of PyTorch's: ``torch.compile`` and ``torch.export`` see one step with a result of known shape, and
not the locks, threads, counts and kernels behind it.

A graph keeps the number of its layer, which finds the module as it is when the graph runs: with the LoRA that it has then. The number
keeps no model alive.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch

from ..ground.errors import KTModelError


class Layer(Protocol):
    """What an operator's call computes."""

    def compute_traced(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, H], index [T, K], weights [T, K] -> [T, H], a new contiguous tensor of ``hidden``'s device and dtype."""


_layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: Layer) -> int:
    """The number under which :func:`experts` finds a layer, in this process and as long as the layer lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def _experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layer: int) -> torch.Tensor:
    found = _layers.get(layer)
    if found is None:
        raise KTModelError(
            f"llamafactory_kt::experts: this process has no layer {layer} (any more). A compiled or exported graph of a model with KT "
            "experts works in the process that made it, as long as the model is loaded; compile it again."
        )
    return found.compute_traced(hidden, index, weights)


def _shape_of_experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


_library = torch.library.Library("llamafactory_kt", "DEF")
_library.define("experts(Tensor hidden, Tensor index, Tensor weights, int layer) -> Tensor")
_library.impl("experts", _experts, "CompositeExplicitAutograd")
torch.library.register_fake("llamafactory_kt::experts", _shape_of_experts, lib=_library)

experts = torch.ops.llamafactory_kt.experts.default
"""``llamafactory_kt::experts(Tensor hidden, Tensor index, Tensor weights, int layer) -> Tensor``"""
