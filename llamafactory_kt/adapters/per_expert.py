"""Formats A and B: one A and one B tensor per expert and projection.

A (KTransformers, early 2026): ``...layers.{L}.mlp.original_moe.experts.{E}.gate_proj.lora_A.weight``. B (PEFT on
transformers 4): the same without ``original_moe``, with Mixtral's ``w1``/``w3``/``w2``, with or without PEFT's
prefix. A is [r, in], B is [out, r].
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from ..ground.errors import KTAdapterError, name_some
from ..ground.tensor_files import TensorStore
from .adapter import Adapter
from .config import LoraSettings
from .expert_lora import ExpertLora, ExpertsShape
from .keys import PROJECTIONS, ExpertKey, belongs_to_experts, expert_module, parse_expert_key

logger = logging.getLogger(__name__)

_Pairs = dict[tuple[int, str], tuple[str, str]]
"""(expert, projection) -> names of A and B"""


class PerExpertAdapter(Adapter):
    """An adapter with one tensor pair per expert and projection, or with no expert tensor at all.

    Raises:
        KTAdapterError: Half of a pair is missing, the ranks of a pair differ, a tensor occurs twice, or the experts have
            something that a kernel cannot compute (DoRA magnitudes, biases).
    """

    format = "per-expert LoRA tensors"

    def __init__(self, directory: Path, settings: LoraSettings, store: TensorStore):
        super().__init__(directory, settings, store)
        names: dict[ExpertKey, str] = {}
        unknown = []
        for name in store.infos:
            if (key := parse_expert_key(name)) is None:
                unknown += [name] if belongs_to_experts(name) else []
            elif key in names:
                raise KTAdapterError(f"{store.path}: {name} and {names[key]} are the same expert's tensor.")
            else:
                names[key] = name
        if unknown:
            raise KTAdapterError(
                f"{store.path}: {len(unknown)} tensors sit on routed experts but are not LoRA A/B pairs, first "
                f"{name_some(unknown, 3)}. DoRA magnitudes and LoRA biases on experts cannot be computed by the kernel: "
                "train without use_dora and bias, or merge the adapter into the base model."
            )
        if settings.use_dora and names:
            raise KTAdapterError(f"{settings.path}: use_dora on routed experts cannot be computed by the kernel.")
        self._pairs: dict[int, _Pairs] = {}
        """layer -> its pairs, by expert and projection"""
        places = {key[:3] for key in names}
        for layer, expert, projection in sorted(places, key=lambda place: (*place[:2], PROJECTIONS.index(place[2]))):
            pair = self._pair(layer, expert, projection, names)
            self._pairs.setdefault(layer, {})[expert, projection] = pair
        self.expert_names, self.layers = list(names.values()), list(self._pairs)
        self._warn_of_ranks()

    def _pair(self, layer: int, expert: int, projection: str, names: dict[ExpertKey, str]) -> tuple[str, str]:
        a, b = (names.get(ExpertKey(layer, expert, projection, side)) for side in "ab")
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
        modules = {a: expert_module(a) for pairs in self._pairs.values() for a, _ in pairs.values()}
        other = [m for a, m in modules.items() if self._rank(a) != self.settings.expected_rank(m)]
        if other:
            logger.warning(
                "%s: %d of %d expert modules have another rank than adapter_config.json says (first: %s); "
                "their scaling is computed with the rank of the tensors.",
                self.store.path, len(other), len(modules), other[0],
            )  # fmt: skip

    def _rank(self, name_a: str) -> int:
        return self.store.infos[name_a].shape[0]

    def _scaling(self, name_a: str) -> float:
        return self.settings.scaling(expert_module(name_a), self._rank(name_a))

    def _features(self, pair: tuple[str, str]) -> tuple[int, int]:
        """(out, in) of the weight that a pair changes."""
        return self.store.infos[pair[1]].shape[0], self.store.infos[pair[0]].shape[1]

    def pairs(self, layer: int, expert: int) -> dict[str, tuple[str, str]]:
        """projection -> names of A and B, of those that the expert has."""
        return {
            projection: pair for (number, projection), pair in self._pairs.get(layer, {}).items() if number == expert
        }

    def rank(self, layer: int) -> int:
        return max(self._rank(a) for a, _ in self._pairs[layer].values())

    def scaling(self, layer: int) -> float:
        return Counter(self._scaling(a) for a, _ in self._pairs[layer].values()).most_common(1)[0][0]

    def own_shapes(self) -> dict[int, ExpertsShape]:
        experts = 1 + max((expert for pairs in self._pairs.values() for expert, _ in pairs), default=-1)
        shapes = {}
        for layer, pairs in self._pairs.items():
            sizes: dict[str, set[int]] = {"hidden_size": set(), "moe_intermediate_size": set()}
            for (_, projection), pair in pairs.items():
                out, width = self._features(pair)
                sizes["hidden_size"].add(out if projection == "down" else width)
                sizes["moe_intermediate_size"].add(width if projection == "down" else out)
            for name, found in sizes.items():
                if len(found) > 1:
                    raise KTAdapterError(
                        f"{self.store.path}: Shape mismatch in layer {layer}: its experts' LoRA was made for {name} "
                        f"{' and '.join(map(str, sorted(found)))}."
                    )
            hidden, intermediate = (found.pop() for found in sizes.values())
            shapes[layer] = ExpertsShape(experts, hidden, intermediate)
        return shapes

    def check_fits(self, shapes: Mapping[int, ExpertsShape]) -> None:
        for layer, pairs in self._pairs.items():
            shape = self.require_layer(layer, shapes)
            for (expert, projection), pair in pairs.items():
                place = f"{self.store.path}: layer {layer}, expert {expert}, {projection}_proj"
                if expert >= shape.num_experts:
                    raise KTAdapterError(
                        f"{place}: the model has {shape.num_experts} experts in this layer.{self.trained_for}"
                    )
                found, wanted = self._features(pair), shape.projection(projection)
                if found != wanted:
                    raise KTAdapterError(
                        f"{place}: LoRA for a weight of {found[0]} x {found[1]}, the model's is {wanted[0]} x {wanted[1]}."
                        f"{self.trained_for}"
                    )

    def read_layer(self, layer: int, shape: ExpertsShape) -> ExpertLora:
        tensors = {place: (self.read(a), self.read(b)) for place, (a, b) in self._pairs[layer].items()}
        dtypes = {tensor.dtype for pair in tensors.values() for tensor in pair}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        lora = ExpertLora.zeros(layer, shape, self.rank(layer), dtype, self.scaling(layer))
        for (expert, projection), (a, b) in tensors.items():
            lora.a[projection][expert, : a.shape[0]] = a
            lora.b[projection][expert, :, : a.shape[0]] = b
            lora.scaling[projection][expert] = self._scaling(self._pairs[layer][expert, projection][0])
        return lora
