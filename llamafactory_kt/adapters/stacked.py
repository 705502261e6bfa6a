"""The experts of a layer stacked into six tensors, in a file beside the adapter: formats C and E.

C is the KT bundle (:mod:`.bundle`): ``fused_expert_lora.safetensors`` with ``layers.{L}.experts.gate_lora_a`` and so on. E is
the SGLang converter's ``moe_lora.pt``: ``{"metadata": {...}, "layer_{L}": {"gate_lora_a": ...}}``. In both, a is [E, r, in] and
b is [E, out, r].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn.functional import pad

from ..ground.errors import KTAdapterError, name_some
from ..ground.file_hash import file_versions
from ..ground.tensors.stores import (
    CombinedStore,
    NestedPickledStore,
    SafetensorsStore,
    TensorStore,
    has_store,
    open_store,
)
from .adapter import Adapter
from .config import LoraSettings
from .expert_lora import ExpertLora, ExpertsShape
from .keys import PROJECTIONS, belongs_to_experts

MOE_LORA = "moe_lora.pt"
_NAME = re.compile(r"^(?:layers\.(\d+)\.experts|layer_(\d+))\.(gate|up|down)_lora_([ab])$")


class StackedAdapter(Adapter):
    """Six stacked tensors per layer, and one scaling.

    Args:
        rest: whether the adapter also has the other tensors that ``directory`` holds, if any.

    Raises:
        KTAdapterError: A tensor is missing or unknown, a shape does not match the others', or the other tensors hold
            routed-expert LoRA too.
    """

    def __init__(
        self, directory: Path, settings: LoraSettings, experts: TensorStore, scaling: float, name: str, *, rest: bool
    ):
        others = open_store(directory) if rest and has_store(directory) else None
        super().__init__(directory, settings, CombinedStore(others, experts) if others else experts)
        self.format, self._scaling, self._experts = name, scaling, experts
        self.files = file_versions(directory, self.store.path, experts.path)
        self._names: dict[int, dict[tuple[str, str], str]] = {}
        for tensor in experts.infos:
            match = _NAME.match(tensor)
            if match is None:
                raise KTAdapterError(f"{experts.path}: the tensor {tensor} is not one of this format's.")
            self._names.setdefault(int(match[1] or match[2]), {})[match[3], match[4]] = tensor
        both = [tensor for tensor in (others.infos if others else ()) if belongs_to_experts(tensor)]
        if both:
            raise KTAdapterError(
                f"{directory} holds routed-expert LoRA twice: {len(both)} tensors in {self.store.infos[both[0]].file.name} (first "
                f"{both[0]}) and {experts.path.name}. Remove one of them."
            )
        for layer, names in self._names.items():
            self._check_layer(layer, names)
        self.expert_names, self.layers = list(experts.infos), sorted(self._names)

    def _check_layer(self, layer: int, names: dict[tuple[str, str], str]) -> None:
        missing = [f"{p}_lora_{side}" for p in PROJECTIONS for side in "ab" if (p, side) not in names]
        if missing:
            raise KTAdapterError(
                f"{self.expert_file}: layer {layer} has no {name_some(missing, 6)}; the file is incomplete."
            )
        for projection in PROJECTIONS:
            a, b = self._shapes(layer, projection)
            if len(a) != 3 or len(b) != 3 or a[0] != b[0] or a[1] != b[2]:
                raise KTAdapterError(
                    f"{self.expert_file}: layer {layer}, {projection}: a has shape {a} and b {b}; wanted [E, r, in] and "
                    "[E, out, r]."
                )

    def _shapes(self, layer: int, projection: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a [E, r, in] and b [E, out, r]."""
        names, infos = self._names[layer], self._experts.infos
        return infos[names[projection, "a"]].shape, infos[names[projection, "b"]].shape

    @property
    def expert_file(self) -> Path:
        return self._experts.path

    def rank(self, layer: int) -> int:
        return max(self._shapes(layer, p)[0][1] for p in PROJECTIONS)

    def scaling(self, layer: int) -> float:
        return self._scaling

    def own_shapes(self) -> dict[int, ExpertsShape]:
        shapes = {}
        for layer in self._names:
            (experts, _, intermediate), (_, hidden, _) = self._shapes(layer, "down")
            shapes[layer] = ExpertsShape(experts, hidden, intermediate)
        self.check_fits(shapes)
        return shapes

    def check_fits(self, shapes: Mapping[int, ExpertsShape]) -> None:
        for layer in self.layers:
            shape = self.require_layer(layer, shapes)
            for projection in PROJECTIONS:
                a, b = self._shapes(layer, projection)
                found, wanted = (a[0], b[1], a[2]), (shape.num_experts, *shape.projection(projection))
                if found != wanted:
                    raise KTAdapterError(
                        f"{self.expert_file}: layer {layer}, {projection}_proj: LoRA for {found[0]} experts of {found[1]} x "
                        f"{found[2]}, the model's are {wanted[0]} of {wanted[1]} x {wanted[2]}.{self.trained_for}"
                    )

    def read_layer(self, layer: int, shape: ExpertsShape) -> ExpertLora:
        names, rank = self._names[layer], self.rank(layer)
        a = {p: self._experts.read(names[p, "a"]) for p in PROJECTIONS}
        b = {p: self._experts.read(names[p, "b"]) for p in PROJECTIONS}
        return ExpertLora(
            layer,
            {p: pad(t, (0, 0, 0, rank - t.shape[1])) for p, t in a.items()},
            {p: pad(t, (0, rank - t.shape[2])) for p, t in b.items()},
            {p: torch.full((shape.num_experts, rank), self._scaling, dtype=torch.float64) for p in PROJECTIONS},
        )


def is_stacked(store: TensorStore) -> bool:
    """Whether a file holds stacked expert tensors and nothing else."""
    return bool(store.infos) and all(_NAME.match(name) for name in store.infos)


def open_stacked(store: SafetensorsStore, settings: LoraSettings | None) -> StackedAdapter:
    """Open one safetensors file of stacked tensors. Its metadata gives rank and alpha, else the configuration.

    Raises:
        KTAdapterError: Neither gives rank and alpha, or they contradict each other.
    """
    metadata = store.metadata()
    try:
        rank, alpha = int(metadata["lora_rank"]), float(metadata["lora_alpha"])
    except (KeyError, ValueError) as error:
        if settings is None:
            raise KTAdapterError(
                f"{store.path} holds stacked expert LoRA, but neither a configuration nor its metadata gives lora_rank and "
                "lora_alpha."
            ) from error
    else:
        if settings is not None and settings.lora_alpha / settings.r != alpha / rank:
            raise KTAdapterError(
                f"{store.path} was written with lora_rank {rank} and lora_alpha {alpha:g}; {settings.path} says "
                f"{settings.r} and {settings.lora_alpha:g}. Leave --config out."
            )
        settings = LoraSettings(store.path, {"r": rank, "lora_alpha": alpha})
    scaling = settings.lora_alpha / settings.r
    return StackedAdapter(store.path.parent, settings, store, scaling, "stacked experts", rest=False)


def open_moe_lora(file: Path, directory: Path | None, settings: LoraSettings | None) -> StackedAdapter:
    """Open ``moe_lora.pt``, alone or with an adapter's directory and configuration. Its metadata gives rank and alpha.

    Raises:
        KTAdapterError: It cannot be read safely, its metadata is incomplete, or the tensors are wrong.
    """
    experts = NestedPickledStore(file)
    rank, alpha = experts.metadata.get("lora_rank"), experts.metadata.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise KTAdapterError(f"{file}: metadata must give lora_rank and lora_alpha, found {experts.metadata}.")
    own = LoraSettings(file, {"r": rank, "lora_alpha": alpha})
    beside = directory is not None
    return StackedAdapter(directory or file.parent, settings or own, experts, alpha / rank, MOE_LORA, rest=beside)
