"""Formats A, B and G: an A and a B for each projection, of one expert or of all.

A (KTransformers, early 2026): ``...layers.{L}.mlp.original_moe.experts.{E}.gate_proj.lora_A.weight``. B (PEFT on
transformers 4): the same without ``original_moe``, with Mixtral's ``w1``/``w3``/``w2``, with or without PEFT's
prefix. A is [r, in], B is [out, r].

G (Megatron-Bridge, SkyRL, SGLang, vLLM, Tinker): ``...experts.gate_proj.lora_A.weight`` of all experts, A [E, r, in], B [E, out, r].
Either may be [1, ...], shared by all experts, while the other half has a tensor for each expert, as in format B. ``gate_up_proj`` has the
rows of gate and up as the model stores them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..ground.errors import KTAdapterError, name_some
from ..ground.tensors.stores import TensorStore
from .adapter import Adapter
from .config import LoraSettings
from .expert_lora import ExpertLora, ExpertsShape, common_dtype
from .keys import (
    NOT_ON_EXPERTS,
    PROJECTIONS,
    ExpertKey,
    belongs_to_experts,
    expert_module,
    is_placeholder,
    parse_expert_key,
)

logger = logging.getLogger(__name__)

GATE_UP = "gate_up"
_Place = tuple[int | None, str]
"""expert (None: all of them) and projection"""


class _Pair(NamedTuple):
    """Names of A and B."""

    a: str
    b: str


class ProjectionAdapter(Adapter):
    """An adapter with LoRA on the projections of experts, or with no tensor on experts at all.

    Raises:
        KTAdapterError: Half of a pair is missing, the ranks of a pair differ, a tensor occurs twice, or the experts have
            something that a kernel cannot compute (DoRA magnitudes, biases).
    """

    format = "per-expert LoRA tensors"

    def __init__(self, directory: Path, settings: LoraSettings, store: TensorStore):
        super().__init__(directory, settings, store)
        self.expert_names, names = self._read_names()
        if settings.use_dora and names:
            raise KTAdapterError(
                f"{settings.path}: use_dora on routed experts cannot be computed by the kernel. Merge the adapter into the model with PEFT, or "
                "train the experts without it."
            )
        self._pairs: dict[int, dict[_Place, _Pair]] = {}
        """layer -> its pairs"""
        for (layer, projection), halves in _by_projection(names).items():
            self._pairs.setdefault(layer, {}).update(self._pair_up(layer, projection, halves))
        self.layers = sorted(self._pairs)
        for layer in self.layers:
            pairs = dict(sorted(self._pairs.pop(layer).items(), key=_in_order))
            self._pairs[layer] = pairs
            if any(expert is None for expert, _ in pairs):
                self.format = "stacked LoRA tensors per projection"
            fused = {expert for expert, projection in pairs if projection == GATE_UP}
            if twice := [expert for expert, projection in pairs if projection in ("gate", "up") and expert in fused]:
                raise KTAdapterError(
                    f"{store.path}: layer {layer}, {_named(twice[0])}: LoRA both on gate_up_proj and on gate_proj or up_proj."
                )
        self.other_ranks = self._find_other_ranks()
        """modules whose ranks the configuration does not say"""

    def _read_names(self) -> tuple[list[str], dict[ExpertKey, str]]:
        """All tensors on experts, and those that are not empty by what they are. Tinker writes empty ones for a gate that is not there."""
        found: list[str] = []
        unknown: list[str] = []
        names: dict[ExpertKey, str] = {}
        for name, info in self.store.infos.items():
            if (key := parse_expert_key(name)) is None:
                unknown += [name] if belongs_to_experts(name) else []
                continue
            found.append(name)
            if key in names:
                raise KTAdapterError(f"{self.store.path}: {name} and {names[key]} are the same expert's tensor.")
            if not is_placeholder(name, info.shape):
                names[key] = name
        if unknown:
            raise KTAdapterError(
                f"{self.store.path}: {len(unknown)} tensors sit on routed experts but are not LoRA A/B pairs, first "
                f"{name_some(unknown, 3)}. {NOT_ON_EXPERTS}"
            )
        return found, names

    def _pair_up(
        self, layer: int, projection: str, halves: dict[str, dict[int | None, str]]
    ) -> Iterator[tuple[_Place, _Pair]]:
        """The pairs of one projection: a half of all experts goes with each expert's own other half."""
        experts = sorted({expert for half in halves.values() for expert in half if expert is not None})
        if experts and all(None in half for half in halves.values()) and len(halves) == 2:
            raise KTAdapterError(
                f"{self.store.path}: layer {layer}, {projection}_proj: LoRA of all experts, {halves['a'][None]}, and of single ones too."
            )
        places: list[int | None] = [*experts] or [None]
        for expert in places:
            a, b = (halves.get(side, {}) for side in "ab")
            pair = a.get(expert, a.get(None)), b.get(expert, b.get(None))
            yield (expert, projection), self._checked(layer, expert, projection, *pair)

    def _checked(self, layer: int, expert: int | None, projection: str, a: str | None, b: str | None) -> _Pair:
        if a is None or b is None:
            missing, there = ("lora_A", b) if a is None else ("lora_B", a)
            raise KTAdapterError(f"{self.store.path}: {there} has no {missing} beside it; the file is incomplete.")
        shapes = [self.store.infos[name].shape for name in (a, b)]
        dims = [3 if key.expert is None else 2 for name in (a, b) if (key := parse_expert_key(name))]
        if [len(shape) for shape in shapes] != dims or not 0 < shapes[0][-2] == shapes[1][-1]:
            raise KTAdapterError(
                f"{self.store.path}: layer {layer}, {_named(expert)}, {projection}_proj: lora_A has shape {shapes[0]} and lora_B "
                f"{shapes[1]}; wanted [r, in] and [out, r] with one rank r, or of all experts [E, r, in] and [E, out, r]."
            )
        return _Pair(a, b)

    def _find_other_ranks(self) -> list[str]:
        modules = {pair.a: expert_module(pair.a) for pairs in self._pairs.values() for pair in pairs.values()}
        other = [m for a, m in modules.items() if self._rank(a) != self.settings.expected_rank(m)]
        if other:
            logger.warning(
                "%s: %d of %d expert modules have another rank than adapter_config.json says (first: %s); "
                "their scaling is computed with the rank of the tensors.",
                self.store.path, len(other), len(modules), other[0],
            )  # fmt: skip
        return other

    def _rank(self, name_a: str) -> int:
        return self.store.infos[name_a].shape[-2]

    def _scaling(self, name_a: str) -> float:
        return self.settings.scaling(expert_module(name_a), self._rank(name_a))

    def _features(self, pair: _Pair) -> tuple[int, int]:
        """(out, in) of the weight that a pair changes."""
        return self.store.infos[pair.b].shape[-2], self.store.infos[pair.a].shape[-1]

    def _stacked(self, pair: _Pair) -> set[int]:
        """The numbers of experts that its tensors are of, if not of one or shared by all."""
        shapes = (self.store.infos[name].shape for name in pair)
        return {shape[0] for shape in shapes if len(shape) == 3} - {1}

    def pairs(
        self, layer: int, expert: int, read: Callable[[str], torch.Tensor]
    ) -> dict[str, tuple[str, torch.Tensor, torch.Tensor]]:
        """projection -> the module's name, A [r, in] and B [out, r], of those that the expert has.

        Args:
            read: :meth:`read`, or one that remembers: a tensor may be of all experts.
        """
        found = {}
        for (number, projection), pair in self._pairs.get(layer, {}).items():
            if number in (None, expert):
                a, b = (_of_expert(read(name), expert) for name in pair)
                found[projection] = expert_module(pair.a), a, b
        return found

    def rank(self, layer: int) -> int:
        return max(self._rank(pair.a) for pair in self._pairs[layer].values())

    def scaling(self, layer: int) -> float:
        return Counter(self._scaling(pair.a) for pair in self._pairs[layer].values()).most_common(1)[0][0]

    def own_shapes(self) -> dict[int, ExpertsShape]:
        every = [place for pairs in self._pairs.values() for place in pairs]
        counts = {expert + 1 for expert, _ in every if expert is not None}
        counts = counts.union(*(self._stacked(pair) for pairs in self._pairs.values() for pair in pairs.values()))
        if every and (not counts or any(projection == GATE_UP for _, projection in every)):
            raise KTAdapterError(
                f"{self.store.path}: LoRA that all experts share, or that is on gate_up_proj, does not tell the number of the experts or the "
                "order of their rows; a model is needed to read it."
            )
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
            shapes[layer] = ExpertsShape(max(counts), hidden, intermediate)
        return shapes

    def check_fits(self, shapes: Mapping[int, ExpertsShape]) -> None:
        for layer, pairs in self._pairs.items():
            shape = self.require_layer(layer, shapes)
            for (expert, projection), pair in pairs.items():
                place = f"{self.store.path}: layer {layer}, {_named(expert)}, {projection}_proj"
                if expert is not None and expert >= shape.num_experts:
                    raise KTAdapterError(
                        f"{place}: the model has {shape.num_experts} experts in this layer.{self.trained_for}"
                    )
                if other := self._stacked(pair) - {shape.num_experts}:
                    raise KTAdapterError(
                        f"{place}: LoRA for {other.pop()} experts, the model has {shape.num_experts} in this layer.{self.trained_for}"
                    )
                found, wanted = self._features(pair), shape.projection(projection)
                if found != wanted:
                    raise KTAdapterError(
                        f"{place}: LoRA for a weight of {found[0]} x {found[1]}, the model's is {wanted[0]} x {wanted[1]}."
                        f"{self.trained_for}"
                    )

    def read_layer(self, layer: int, shape: ExpertsShape) -> ExpertLora:
        pairs = self._pairs[layer]
        tensors = {name: self.read(name) for pair in pairs.values() for name in pair}
        dtype = common_dtype(tensors.values())
        lora = ExpertLora.zeros(layer, shape, self.rank(layer), dtype, self.scaling(layer))
        for (expert, projection), pair in pairs.items():
            experts = slice(None) if expert is None else expert
            a, b = (tensors[name] if expert is None else _of_expert(tensors[name], expert) for name in pair)
            parts = {projection: b}
            if projection == GATE_UP:
                parts = dict(zip(("gate", "up"), shape.fused.split(b, b.dim() - 2), strict=True))
            for name, part in parts.items():
                lora.a[name][experts, : self._rank(pair.a)] = a
                lora.b[name][experts, :, : self._rank(pair.a)] = part
                lora.scaling[name][experts] = self._scaling(pair.a)
        return lora


def _by_projection(names: Mapping[ExpertKey, str]) -> dict[tuple[int, str], dict[str, dict[int | None, str]]]:
    """(layer, projection) -> side -> expert -> name."""
    found: dict[tuple[int, str], dict[str, dict[int | None, str]]] = {}
    for key, name in names.items():
        found.setdefault((key.layer, key.projection), {}).setdefault(key.side, {})[key.expert] = name
    return found


def _in_order(item: tuple[_Place, _Pair]) -> tuple[int, int]:
    (expert, projection), _ = item
    return -1 if expert is None else expert, (*PROJECTIONS, GATE_UP).index(projection)


def _named(expert: int | None) -> str:
    return "all experts" if expert is None else f"expert {expert}"


def _of_expert(tensor: torch.Tensor, expert: int) -> torch.Tensor:
    """An expert's own of what may be shared or of all experts."""
    if tensor.dim() == 2:
        return tensor
    return tensor[expert] if len(tensor) > 1 else tensor[0]
