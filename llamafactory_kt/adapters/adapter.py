"""An adapter on disk, split into the tensors of routed experts and all others. Each format is a subclass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ..ground.errors import KTAdapterError, name_some
from ..ground.file_hash import file_versions
from ..ground.tensors.stores import TensorStore
from .config import LoraSettings
from .expert_lora import ExpertLora, ExpertsShape
from .keys import is_placeholder, split_module

_FLOATS = {"BF16", "F16", "F32", "F64"}
_LARGEST = 1e12
"""of a value: A, B, the rank, a scaling and a hidden state multiplied stay far below the largest float32, 3e38"""


def _computable(tensor: torch.Tensor) -> bool:
    least, most = tensor.aminmax() if tensor.numel() else (tensor.new_zeros(()),) * 2  # NaN, if it holds one
    return bool(least >= -_LARGEST) and bool(most <= _LARGEST)


class Adapter(ABC):
    """A LoRA adapter, opened by its headers; values are read on demand."""

    format: str
    """what messages and reports call the layout"""
    expert_names: list[str]
    """tensors of routed experts, in file order"""
    layers: list[int]
    """layers with routed-expert LoRA, ascending"""

    def __init__(self, directory: Path, settings: LoraSettings, store: TensorStore):
        self.directory = directory
        self.settings = settings
        self.store = store
        self.files = file_versions(directory, store.path)
        """path, bytes and time of the last change of each file, when it was opened"""
        self._finite: set[str] = set()
        """tensors found without NaN and Inf, so that none is checked twice"""
        self._check_headers()

    def _check_headers(self) -> None:
        infos = self.store.infos
        if not infos:
            raise KTAdapterError(
                f"{self.store.path} holds no tensors: nothing was trained, or the file was not saved whole."
            )
        if other := {name: info.dtype for name, info in infos.items() if info.dtype not in _FLOATS}:
            raise KTAdapterError(
                f"{self.store.path}: {len(other)} of {len(infos)} tensors are {name_some(sorted(set(other.values())))}, first "
                f"{next(iter(other))}; an adapter's are BF16, F16 or F32. Save it again in one of these."
            )
        halves = [name for name in infos if split_module(name)[1] in ("lora_A.weight", "lora_B.weight")]
        empty = [name for name in halves if 0 in infos[name].shape and not is_placeholder(name, infos[name].shape)]
        if empty:
            raise KTAdapterError(
                f"{self.store.path}: {len(empty)} of {len(infos)} tensors are empty, first {empty[0]} {infos[empty[0]].shape}. DeepSpeed ZeRO-3 "
                "saves such files without stage3_gather_16bit_weights_on_model_save: gather the weights (zero_to_fp32.py in the checkpoint), and "
                "save the adapter again."
            )
        if flat := [n for n in halves if len(infos[n].shape) < 2 and not is_placeholder(n, infos[n].shape)]:
            raise KTAdapterError(
                f"{self.store.path}: {flat[0]} has shape {infos[flat[0]].shape}; LoRA is A [r, in] and B [out, r]."
            )

    @property
    def other_names(self) -> list[str]:
        """Tensors that are not of routed experts, in file order."""
        experts = set(self.expert_names)
        return [name for name in self.store.infos if name not in experts]

    @property
    def expert_file(self) -> Path:
        """The file with the routed experts' tensors."""
        return self.store.path

    @property
    def trained_for(self) -> str:
        """The end of a message: a sentence with the base model in the configuration, or nothing if it names none."""
        base = self.settings.raw.get("base_model_name_or_path")
        return f" The adapter was trained for {base}." if base else ""

    def require_layer(self, layer: int, shapes: Mapping[int, ExpertsShape]) -> ExpertsShape:
        """The model's experts in a layer.

        Raises:
            KTAdapterError: The model has no routed experts in this layer.
        """
        if layer not in shapes:
            raise KTAdapterError(
                f"{self.expert_file}: layer {layer} has expert LoRA, but the model's layers with routed experts are "
                f"{name_some(sorted(shapes), 4)}.{self.trained_for}"
            )
        return shapes[layer]

    @abstractmethod
    def rank(self, layer: int) -> int:
        """The largest rank of the layer's experts."""

    @abstractmethod
    def scaling(self, layer: int) -> float:
        """The scaling that most of the layer's experts share."""

    @abstractmethod
    def own_shapes(self) -> dict[int, ExpertsShape]:
        """layer -> the experts that the adapter was trained for, as far as its tensors tell.

        Raises:
            KTAdapterError: They do not tell.
        """

    @abstractmethod
    def check_fits(self, shapes: Mapping[int, ExpertsShape]) -> None:
        """Compare with a model's experts, given per layer.

        Raises:
            KTAdapterError: Naming the first layer, expert or size that differs.
        """

    @abstractmethod
    def read_layer(self, layer: int, shape: ExpertsShape) -> ExpertLora:
        """Read one layer's routed-expert LoRA, stacked over the model's experts."""

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor as it is stored."""
        return self.store.read(name)

    def check_unchanged(self) -> None:
        """Compare the files with what they were when the adapter was opened: a part of a new one would not go with the rest.

        Raises:
            KTAdapterError: Some have changed, or are gone.
        """
        try:
            now = file_versions(self.directory, self.store.path)
        except OSError:
            now = ()
        if now != self.files:
            raise KTAdapterError(
                f"{self.store.path}: the adapter's files have changed since it was opened, or are gone. What is applied stays so; load the "
                "model again for the new ones."
            )

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Read the tensors (by default all) and look for NaN, Inf and values whose products would be Inf; tensors that were checked before are
        not read again.

        Raises:
            KTAdapterError: With the number of tensors affected and the first names.
        """
        bad: list[str] = []
        for name in self.store.infos if names is None else names:
            if name not in self._finite:
                (self._finite.add if _computable(self.read(name)) else bad.append)(name)
        if bad:
            raise KTAdapterError(
                f"{self.store.path}: {len(bad)} of {len(self.store.infos)} tensors hold NaN or Inf, first {name_some(bad, 3)} (values beyond {_LARGEST:g} "
                "count: their products are Inf). "
                "The training run diverged or the file was damaged; use an earlier checkpoint."
            )
