"""What an adapter makes of one of the model's own weights: it puts another in its place, replaces rows, or adds LoRA to it.

PEFT wraps modules for the first two; putting another weight in place is the same, costs nothing per token, and works for every module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..adapters import Adapter
from ..ground.errors import KTAdapterError, name_some


@dataclass(frozen=True)
class Change(ABC):
    """A change of one parameter or buffer. Sums are float32: several changes of a weight are rounded once, after the last."""

    tensors: tuple[str, ...]
    """in the adapter's file"""

    @abstractmethod
    def problem(self, adapter: Adapter, shape: tuple[int, ...]) -> str:
        """Why it does not fit a weight of this shape, told by headers; empty if it does."""

    @abstractmethod
    def apply(self, adapter: Adapter, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight, on the weight's device, in a dtype that holds it exactly; ``weight`` itself is left as it is."""

    def shapes(self, adapter: Adapter) -> list[tuple[int, ...]]:
        """Of :attr:`tensors`."""
        return [adapter.store.infos[name].shape for name in self.tensors]


class Replace(Change):
    """Another weight: ``modules_to_save``, ``bias: all``, and embeddings that PEFT saved with an adapter; some under two names."""

    def problem(self, adapter: Adapter, shape: tuple[int, ...]) -> str:
        found = self.shapes(adapter)
        wrong = next((number for number, of_it in enumerate(found) if of_it != shape), None)
        return "" if wrong is None else f"{self.tensors[wrong]} has shape {found[wrong]}, the model's weight {shape}."

    def apply(self, adapter: Adapter, weight: torch.Tensor) -> torch.Tensor:
        first, *others = (adapter.read(name) for name in self.tensors)
        if not all(torch.equal(first, other) for other in others):
            raise KTAdapterError(f"{adapter.store.path}: {name_some(self.tensors)} are the same weight, and differ.")
        return first.to(weight.device, copy=True)


@dataclass(frozen=True)
class ReplaceRows(Change):
    """Other embeddings of some tokens: ``trainable_token_indices`` (PEFT's ``trainable_tokens_delta`` holds the rows, not differences)."""

    rows: tuple[int, ...]

    def problem(self, adapter: Adapter, shape: tuple[int, ...]) -> str:
        [found] = self.shapes(adapter)
        if found != (len(self.rows), shape[-1]):
            return f"{self.tensors[0]} has shape {found}; wanted ({len(self.rows)}, {shape[-1]}), a row for each of trainable_token_indices."
        if outside := [row for row in self.rows if not 0 <= row < shape[0]]:
            return f"trainable_token_indices has {outside[0]}, the model has {shape[0]} tokens."
        return ""

    def apply(self, adapter: Adapter, weight: torch.Tensor) -> torch.Tensor:
        changed = weight.clone()
        changed[list(self.rows)] = adapter.read(self.tensors[0]).to(weight.device, weight.dtype)
        return changed


@dataclass(frozen=True)
class AddLora(Change):
    """LoRA, summed into the weight: of routers, whose weight PEFT cannot wrap, and wherever an adapter is merged."""

    scaling: float
    embedding: bool = False
    """an embedding [V, H] with A [r, V] and B [H, r]; else a weight [out, in, ...] with A [r, in, ...] and B [out, r, ...]"""

    def problem(self, adapter: Adapter, shape: tuple[int, ...]) -> str:
        a, b = self.shapes(adapter)[:2]
        if len(a) < 2 or len(a) != len(b) or a[0] != b[1]:
            return f"LoRA of {a} and {b} ({self.tensors[0]}) is no pair A [r, in] and B [out, r]."
        found = (a[1], b[0]) if self.embedding else (b[0], *a[1:])
        return "" if found == shape else f"LoRA of {a} and {b} ({self.tensors[0]}) for a weight of {shape}."

    def apply(self, adapter: Adapter, weight: torch.Tensor) -> torch.Tensor:
        a, b = (adapter.read(name).to(weight.device, torch.float32).flatten(1) for name in self.tensors[:2])
        delta = (b @ a).T if self.embedding else (b @ a).reshape(weight.shape)
        return weight.float() + self.scaling * delta


class AddDora(AddLora):
    """DoRA: each row of a linear layer's sum, or each column of an embedding's, gets the length that the magnitude vector says (peft 0.18,
    ``DoraLinearLayer`` and ``DoraEmbeddingLayer``)."""

    def problem(self, adapter: Adapter, shape: tuple[int, ...]) -> str:
        found = self.shapes(adapter)[2]
        fits = len(shape) == 2 and found == (shape[int(self.embedding)],)
        wrong = "" if fits else f"{self.tensors[2]} has shape {found}, for a weight of {shape}."
        return super().problem(adapter, shape) or wrong

    def apply(self, adapter: Adapter, weight: torch.Tensor) -> torch.Tensor:
        summed, along = super().apply(adapter, weight), int(not self.embedding)
        length = adapter.read(self.tensors[2]).to(weight.device, torch.float32) / summed.norm(dim=along)
        changed: torch.Tensor = length.unsqueeze(along) * summed
        return changed


@dataclass(frozen=True)
class AddBias(Change):
    """``lora_bias``: the bias of B, scaled like B itself."""

    scaling: float

    def problem(self, adapter: Adapter, shape: tuple[int, ...]) -> str:
        [found] = self.shapes(adapter)
        return "" if found == shape else f"{self.tensors[0]} has shape {found}, the model's bias {shape}."

    def apply(self, adapter: Adapter, weight: torch.Tensor) -> torch.Tensor:
        bias = adapter.read(self.tensors[0]).to(weight.device, torch.float32)
        return weight.float() + self.scaling * bias
