"""What one module of a model computes, and a float32 copy of it that PEFT can change."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ...peft_side.split import submodule, weight_of
from .peft_reading import Weights

_ROWS = 16
"""of random input that each module gets"""
_TOKENS = 4096
"""whose embeddings are compared"""

Read = Callable[[str], torch.Tensor]
"""a parameter's or buffer's name in the model -> its value without adapters, float32 on the CPU"""


class Probe:
    """One module. Linear layers, embeddings and convolutions are asked for their output, all others show their weights.

    Args:
        plain: the model, without PEFT's wrapper around it.
        name: the module's.
        tokens: embeddings that are compared in any case.
    """

    def __init__(self, plain: Any, name: str, tokens: Collection[int] = ()):
        self._plain, self._name = plain, name
        self._own: Any = submodule(plain, name)
        own, random = self._own, torch.Generator().manual_seed(0)
        self._input: torch.Tensor | None = None
        if isinstance(own, nn.Linear):
            self._input = torch.randn(_ROWS, own.in_features, generator=random)
        elif isinstance(own, _ConvNd):
            self._input = torch.randn(_ROWS, own.in_channels, *own.kernel_size, generator=random)
        elif isinstance(own, nn.Embedding):
            some = torch.randperm(own.num_embeddings, generator=random)[:_TOKENS]
            self._input = torch.tensor(sorted({*some.tolist(), *tokens}))
        named = (*own.named_parameters(recurse=False), *own.named_buffers(recurse=False))
        self._leaves = [leaf for leaf, _ in named]

    def copy(self, read: Read, linear: bool) -> nn.Module:
        """The module without adapters, in float32.

        Args:
            linear: PEFT has LoRA on it, so it was a linear layer in training, if it is none here (routers).
        """
        own: Any = self._own
        values = {leaf: read(f"{self._name}.{leaf}") for leaf in self._leaves}
        if isinstance(own, nn.Linear) or (linear and self._input is None):
            out, width = values["weight"].shape
            if linear:
                values.setdefault("bias", torch.zeros(out))  # into which PEFT merges that of B
            made: nn.Module = nn.Linear(width, out, bias="bias" in values)
        elif self._input is not None:
            made = deepcopy(own).float().cpu()
        else:
            return Weights(values)
        for leaf in ("weight", "bias"):
            if leaf in values:
                setattr(made, leaf, nn.Parameter(values[leaf].clone(), requires_grad=False))
        return made

    @torch.inference_mode()
    def of_model(self) -> torch.Tensor:
        """What the model has now, adapters included, [N, ...] float32 on the CPU."""
        if self._input is None:
            return self._shown({leaf: weight_of(self._plain, f"{self._name}.{leaf}") for leaf in self._leaves})
        weight = self._own.weight
        given = self._input.to(weight.device)
        if given.is_floating_point():
            given = given.to(weight.dtype)
        found: torch.Tensor = self._plain.get_submodule(self._name)(given)
        return found.float().cpu().flatten(1)

    @torch.inference_mode()
    def of_copy(self, module: nn.Module) -> torch.Tensor:
        """The same of a copy, changed or not."""
        if self._input is None:
            return self._shown({leaf: getattr(module, leaf) for leaf in self._leaves})
        given = self._input
        if given.is_floating_point():
            given = given.to(self._own.weight.dtype).float()
        found: torch.Tensor = module(given)
        return found.flatten(1)

    @staticmethod
    def _shown(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([weight.detach().float().cpu().flatten() for weight in weights.values()])[None]
