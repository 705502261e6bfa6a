"""What a decoder layer is called with."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

MOST = 16
"""sequences at once"""


@dataclass
class Call:
    """One call, for one token of each sequence."""

    key: Any
    """tells kinds of calls apart: all but the tensors' values and the length of the cache"""
    inputs: list[torch.Tensor]
    """[B, 1, H] hidden states first"""
    mask: torch.Tensor | None
    """[B or 1, 1, 1, keys], bool"""
    cache: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """A call with arguments of known kinds; None for others."""
        key: list[Any] = []
        inputs: list[torch.Tensor] = []
        mask = cache = None
        for name, value in chain(enumerate(args), kwargs.items()):
            if name == "attention_mask" and isinstance(value, torch.Tensor):
                if value.dtype != torch.bool or value.dim() != 4 or value.shape[1:3] != (1, 1):
                    return None
                mask = value
                key.append((name, len(value)))
            elif isinstance(value, torch.Tensor):
                inputs.append(value)
                key.append((name, value.shape, value.dtype, value.device))
            elif isinstance(value, tuple) and all(isinstance(part, torch.Tensor) for part in value):
                inputs += value
                key.append((name, *((part.shape, part.dtype) for part in value)))
            elif isinstance(value, Cache):
                cache = value
                key.append(name)
            elif value is None or isinstance(value, bool | int | float | str):
                key.append((name, value))
            else:
                return None
        if (
            not inputs
            or inputs[0].dim() != 3
            or inputs[0].shape[1] != 1
            or len(inputs[0]) > MOST
            or inputs[0].device.type != "cpu"
        ):
            return None
        return cls(tuple(key), inputs, mask, cache, args, kwargs)

    @property
    def length(self) -> int | None:
        """Tokens that the cache holds; None where there is none, or where it does not grow."""
        layers = getattr(self.cache, "layers", ())
        return max((int(layer.get_seq_length()) for layer in layers if isinstance(layer, DynamicLayer)), default=None)

    def continues(self, before: Call, result: Any) -> bool:
        """Whether a layer called so takes what the layer before returned, and all else that that one took."""
        return self.key == before.key and follows(self.args, self.kwargs, before, result)


def follows(args: tuple[Any, ...], kwargs: dict[str, Any], before: Call, result: Any) -> bool:
    """Whether arguments are those of ``before``, but for the first, which is ``result``."""
    others, own = before.args[1:], args[1:]
    return (
        len(args) > 0
        and args[0] is result
        and len(own) == len(others)
        and kwargs.keys() == before.kwargs.keys()
        and all(a is b for a, b in zip(own, others, strict=True))
        and all(value is before.kwargs[name] for name, value in kwargs.items())
    )
