"""An adapter on disk, split into the tensors of routed experts and all others. One subclass a format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..ground.errors import KTAdapterError, name_some
from ..ground.tensor_files import TensorStore, all_finite
from .config import LoraSettings
from .expert_lora import ExpertLora


@dataclass(frozen=True)
class ExpertsShape:
    """Sizes of one layer's routed experts."""

    num_experts: int
    hidden_size: int
    intermediate_size: int

    @property
    def num_weights(self) -> int:
        """Numbers in gate, up and down of all experts."""
        return 3 * self.num_experts * self.hidden_size * self.intermediate_size

    def projection(self, name: str) -> tuple[int, int]:
        """(out, in) features of ``gate``, ``up`` or ``down``."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        return (hidden, intermediate) if name == "down" else (intermediate, hidden)


class Adapter(ABC):
    """A LoRA adapter, opened by its headers; values are read on demand."""

    format: str
    """What the layout is called in messages and reports."""

    def __init__(self, directory: Path, settings: LoraSettings, store: TensorStore):
        self.directory = directory
        self.settings = settings
        self.store = store
        self._finite: set[str] = set()
        """tensors without NaN and Inf, so that none is looked through twice"""

    @property
    @abstractmethod
    def expert_names(self) -> list[str]:
        """Tensors of routed experts, in file order."""

    @property
    def expert_file(self) -> Path:
        """The file the routed experts' tensors are in."""
        return self.store.path

    @property
    def trained_for(self) -> str:
        """A sentence with the model the adapter says it was trained for, to end a message with."""
        base = self.settings.raw.get("base_model_name_or_path")
        return f" The adapter was trained for {base}." if base else ""

    def require_layer(self, layer: int, shapes: Mapping[int, ExpertsShape]) -> ExpertsShape:
        """The model's experts in a layer.

        Raises:
            KTAdapterError: It has none there.
        """
        if layer not in shapes:
            raise KTAdapterError(
                f"{self.expert_file}: layer {layer} has expert LoRA, but the model's layers with routed experts are "
                f"{name_some(sorted(shapes), 4)}.{self.trained_for}"
            )
        return shapes[layer]

    @property
    @abstractmethod
    def layers(self) -> list[int]:
        """Layers with routed-expert LoRA, ascending."""

    @abstractmethod
    def rank(self, layer: int) -> int:
        """The largest rank of the layer's experts."""

    @abstractmethod
    def scaling(self, layer: int) -> float:
        """The scaling most of the layer's experts share."""

    @abstractmethod
    def own_shapes(self) -> dict[int, ExpertsShape]:
        """The experts per layer as far as the adapter itself tells: what it was trained for, without a model.

        Raises:
            KTAdapterError: Its tensors do not tell.
        """

    @abstractmethod
    def check_fits(self, shapes: Mapping[int, ExpertsShape]) -> None:
        """Compare with the experts of a model, given per layer index.

        Raises:
            KTAdapterError: Naming the first layer, expert or size that differs.
        """

    @abstractmethod
    def read_layer(self, layer: int, shape: ExpertsShape) -> ExpertLora:
        """Read one layer's routed-expert LoRA, stacked over the model's experts."""

    @property
    def other_names(self) -> list[str]:
        """Tensors that are not of routed experts, in file order."""
        experts = set(self.expert_names)
        return [name for name in self.store.infos if name not in experts]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor as it is stored."""
        return self.store.read(name)

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Read the tensors (by default all), each once, looking for NaN and Inf.

        Raises:
            KTAdapterError: With the number of tensors affected and the first names.
        """
        bad: list[str] = []
        for name in self.store.infos if names is None else names:
            if name not in self._finite:
                (self._finite.add if all_finite(self.read(name)) else bad.append)(name)
        if bad:
            raise KTAdapterError(
                f"{self.store.path}: {len(bad)} of {len(self.store.infos)} tensors hold NaN or Inf, first {name_some(bad, 3)}. "
                "The training run diverged or the file was damaged; use an earlier checkpoint."
            )
