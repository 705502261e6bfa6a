"""Weights around the experts that are on disk as integers, too (``kt_weight_path``), for whoever quantizes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ground.paging import are_of_a_file


class CachedDense:
    """Finds the integers of a weight for as long as it is the checkpoint's own.

    Args:
        model: just loaded.
        blocks: of :class:`~llamafactory_kt.engines.native.integer_files.IntegersFile`, by the weights' names in the model.
    """

    def __init__(self, model: Any, blocks: Mapping[str, torch.Tensor]):
        weights = dict(model.named_parameters(remove_duplicate=False))  # of tied ones, each name
        own = [(weights[name].detach(), block) for name, block in blocks.items() if name in weights]
        self._own = {weight.data_ptr(): (weight, block) for weight, block in own}
        self.used = 0
        """weights that were taken"""

    def block_of(self, weight: torch.Tensor) -> torch.Tensor | None:
        """A weight's integers; None if there are none, or if its memory is not the checkpoint's file as it was mapped when the model was
        loaded: converted to another dtype, resized, replaced or changed by an adapter."""
        own, block = self._own.get(weight.data_ptr(), (None, None))
        if own is None or (own.shape, own.dtype) != (weight.shape, weight.dtype) or not are_of_a_file(weight):
            return None
        self.used += 1
        return block
