"""Formats A and B: one A and one B tensor per expert and projection.

A (KTransformers, early 2026): ``...layers.{L}.mlp.original_moe.experts.{E}.gate_proj.lora_A.weight``. B (PEFT on
transformers 4): the same without ``original_moe``, with Mixtral's ``w1``/``w3``/``w2``, with or without PEFT's
prefix. A is [r, in], B is [out, r].
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch

from ..ground.errors import KTAdapterError, name_some
from ..ground.tensor_files import TensorStore
from .adapter import Adapter, ExpertsShape
from .config import LoraSettings
from .expert_lora import ExpertLora
from .keys import PROJECTIONS, ExpertKey, belongs_to_experts, expert_module, parse_expert_key

logger = logging.getLogger(__name__)

_Place = tuple[int, str]  # expert, projection


class PerExpertAdapter(Adapter):
    """An adapter with one tensor pair per expert and projection, or with no expert tensor at all.

    Raises:
        KTAdapterError: A half of a pair is missing, ranks of a pair differ, a tensor occurs twice, or the experts
            carry something a kernel cannot compute (DoRA magnitudes, biases).
    """

    format = "per-expert LoRA tensors"

    def __init__(self, directory: Path, settings: LoraSettings, store: TensorStore):
        super().__init__(directory, settings, store)
        self._names: dict[ExpertKey, str] = {}
        unknown = []
        for name in store.infos:
            key = parse_expert_key(name)
            if key is None:
                unknown += [name] if belongs_to_experts(name) else []
                continue
            if key in self._names:
                raise KTAdapterError(f"{store.path}: {name} and {self._names[key]} are the same expert's tensor.")
            self._names[key] = name
        self._refuse_unknown(unknown)
        if settings.use_dora and self._names:
            raise KTAdapterError(f"{settings.path}: use_dora on routed experts cannot be computed by the kernel.")
        self._pairs = {place: self._pair(*place) for place in dict.fromkeys((k[0], k[1], k[2]) for k in self._names)}
        self._warn_of_ranks()

    def _refuse_unknown(self, names: list[str]) -> None:
        if names:
            raise KTAdapterError(
                f"{self.store.path}: {len(names)} tensors sit on routed experts but are not LoRA A/B pairs, first "
                f"{name_some(names, 3)}. DoRA magnitudes and LoRA biases on experts cannot be computed by the kernel: "
                "train without use_dora and bias, or merge the adapter into the base model."
            )

    def _pair(self, layer: int, expert: int, projection: str) -> tuple[str, str]:
        halves = {side: self._names.get(ExpertKey(layer, expert, projection, side)) for side in "ab"}
        a, b = halves["a"], halves["b"]
        if a is None or b is None:
            missing, there = ("lora_A", b) if a is None else ("lora_B", a)
            raise KTAdapterError(f"{self.store.path}: {there} has no {missing} beside it; the file is incomplete.")
        shape_a, shape_b = self.store.infos[a].shape, self.store.infos[b].shape
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or shape_a[0] < 1:
            raise KTAdapterError(
                f"{self.store.path}: layer {layer}, expert {expert}, {projection}_proj: lora_A has shape {shape_a} and "
                f"lora_B {shape_b}; wanted [r, in] and [out, r] with one rank r."
            )
        return a, b

    def _warn_of_ranks(self) -> None:
        modules = {a: expert_module(a) for a, _ in self._pairs.values()}
        other = [m for a, m in modules.items() if self.store.infos[a].shape[0] != self.settings.expected_rank(m)]
        if other:
            logger.warning(
                "%s: %d of %d expert modules have another rank than adapter_config.json says (first: %s); "
                "their scaling is computed with the rank of the tensors.",
                self.store.path, len(other), len(modules), other[0],
            )  # fmt: skip

    @property
    def expert_names(self) -> list[str]:
        return list(self._names.values())

    @cached_property
    def _layers(self) -> dict[int, dict[_Place, tuple[str, str]]]:
        layers: dict[int, dict[_Place, tuple[str, str]]] = {}
        for (layer, expert, projection), pair in self._pairs.items():
            layers.setdefault(layer, {})[expert, projection] = pair
        return dict(sorted(layers.items()))

    @property
    def layers(self) -> list[int]:
        return list(self._layers)

    def rank(self, layer: int) -> int:
        return max(self.store.infos[a].shape[0] for a, _ in self._layers[layer].values())

    def _scaling(self, name_a: str) -> float:
        return self.settings.scaling(expert_module(name_a), self.store.infos[name_a].shape[0])

    def scaling(self, layer: int) -> float:
        return Counter(self._scaling(a) for a, _ in self._layers[layer].values()).most_common(1)[0][0]

    def _sorted(self, layer: int) -> Iterator[tuple[_Place, tuple[str, str]]]:
        yield from sorted(self._layers[layer].items(), key=lambda item: (item[0][0], PROJECTIONS.index(item[0][1])))

    def own_shapes(self) -> dict[int, ExpertsShape]:
        experts = 1 + max((place[0] for pairs in self._layers.values() for place in pairs), default=-1)
        shapes = {}
        for layer, pairs in self._layers.items():
            sizes: dict[str, set[int]] = {"hidden_size": set(), "moe_intermediate_size": set()}
            for (_, projection), (a, b) in pairs.items():
                out, size = self.store.infos[b].shape[0], self.store.infos[a].shape[1]
                sizes["hidden_size"].add(out if projection == "down" else size)
                sizes["moe_intermediate_size"].add(size if projection == "down" else out)
            for name, found in sizes.items():
                if len(found) > 1:
                    raise KTAdapterError(
                        f"{self.store.path}: Shape mismatch in layer {layer}: its experts' LoRA was made for {name} "
                        f"{' and '.join(map(str, sorted(found)))}."
                    )
            shapes[layer] = ExpertsShape(experts, *(found.pop() for found in sizes.values()))
        return shapes

    def check_fits(self, shapes: Mapping[int, ExpertsShape]) -> None:
        for layer in self.layers:
            shape = self.require_layer(layer, shapes)
            for (expert, projection), (a, b) in self._sorted(layer):
                place = f"{self.store.path}: layer {layer}, expert {expert}, {projection}_proj"
                if expert >= shape.num_experts:
                    raise KTAdapterError(
                        f"{place}: the model has {shape.num_experts} experts in this layer.{self.trained_for}"
                    )
                found = self.store.infos[b].shape[0], self.store.infos[a].shape[1]
                if found != shape.projection(projection):
                    out, size = shape.projection(projection)
                    raise KTAdapterError(
                        f"{place}: LoRA for a weight of {found[0]} x {found[1]}, the model's is {out} x {size}.{self.trained_for}"
                    )

    def read_layer(self, layer: int, shape: ExpertsShape) -> ExpertLora:
        pairs, experts, rank = self._layers[layer], shape.num_experts, self.rank(layer)
        tensors = {names: (self.read(names[0]), self.read(names[1])) for names in pairs.values()}
        dtypes = {t.dtype for pair in tensors.values() for t in pair}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        a, b, scaling = {}, {}, {}
        for projection in PROJECTIONS:
            out_features, in_features = shape.projection(projection)
            a[projection] = torch.zeros(experts, rank, in_features, dtype=dtype)
            b[projection] = torch.zeros(experts, out_features, rank, dtype=dtype)
            scaling[projection] = torch.full((experts, rank), self.scaling(layer), dtype=torch.float64)
        for (expert, projection), names in pairs.items():
            tensor_a, tensor_b = tensors[names]
            a[projection][expert, : tensor_a.shape[0]] = tensor_a
            b[projection][expert, :, : tensor_a.shape[0]] = tensor_b
            scaling[projection][expert] = self._scaling(names[0])
        return ExpertLora(layer, a, b, scaling)
