"""Format D: PEFT's ``target_parameters``, LoRA on the fused 3-D expert weights of transformers 5.

``...experts.base_layer.lora_{A,B}.weight`` and ``...experts.lora_{A,B}.weight``, one pair for ``gate_up_proj``
[E, 2I, H] and one for ``down_proj`` [E, H, I]. A's rows are expert-major, B's columns rank-major. PEFT 0.18 takes the second axis of a
parameter for the input: the LoRA of a usual one lies over the transposed weight (A [r*E, out], B [in, r*E]), of one that is stored
transposed (gpt-oss) over the weight itself (A [r*E, in], B [out, r*E]). 0.19 and later lay it over the weight itself, unless the
parameter is stored transposed and its class does not say so (Llama-4). The sources are ``ParamWrapper`` in ``tuners/lora/layer.py`` of both.
Some trainers order B's columns otherwise (:mod:`.provenance`). What Megatron-Bridge writes for vLLM has the same values in three dimensions,
A [E, r, in] and B [out, r, E].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

from ..ground.errors import KTAdapterError, name_some
from ..ground.tensors.stores import TensorStore
from .adapter import Adapter
from .config import LoraSettings
from .expert_lora import ExpertLora, ExpertsShape, common_dtype
from .keys import NOT_ON_EXPERTS, PEFT_PREFIX, belongs_to_experts
from .provenance import grouped_by_expert, peft_layout

_NAME = re.compile(
    r"^(?P<module>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\.)?experts)(?P<wrap>(?:\.base_layer)*)"
    r"\.lora_(?P<side>[AB])(?:\.(?!weight$)[^.]+)?\.weight$"
)
_GATE_UP, _UP, _DOWN = "gate_up_proj", "up_proj", "down_proj"


class _Pair(NamedTuple):
    """Names of A and B, and the experts module that they change."""

    module: str
    a: str
    b: str


class _Orientation(NamedTuple):
    """Which weight a pair changes, and whether A is on its input side."""

    weight: str
    input_first: bool


def is_target_parameters(store: TensorStore) -> bool:
    """Whether a file holds LoRA on fused expert weights."""
    return any(_NAME.match(name) for name in store.infos)


class TargetParametersAdapter(Adapter):
    """Expert LoRA on fused weights; gate and up share one A or B, and get the same rank.

    Raises:
        KTAdapterError: Half of a pair is missing, or the experts have other tensors too.
    """

    format = "PEFT target_parameters"

    def __init__(self, directory: Path, settings: LoraSettings, store: TensorStore):
        super().__init__(directory, settings, store)
        halves: dict[tuple[int, str, str], dict[str, str]] = {}
        self.expert_names, unknown = [], []
        for name in store.infos:
            if match := _NAME.match(name):
                module = match["module"].removeprefix(PEFT_PREFIX)
                half = halves.setdefault((int(match["layer"]), module, match["wrap"]), {})
                if (same := half.setdefault(match["side"], name)) != name:
                    raise KTAdapterError(f"{store.path}: {same} and {name} are the same weight.")
                self.expert_names.append(name)
            elif belongs_to_experts(name):
                unknown.append(name)
        if unknown:
            raise KTAdapterError(
                f"{store.path}: {len(unknown)} tensors sit on routed experts but are not LoRA on their fused weights, first "
                f"{name_some(unknown, 3)}. {NOT_ON_EXPERTS}"
            )
        self._pairs: dict[int, list[_Pair]] = {}
        for (layer, module, _), sides in halves.items():
            if set(sides) != {"A", "B"}:
                raise KTAdapterError(
                    f"{store.path}: {next(iter(sides.values()))} has no other half; the file is incomplete."
                )
            pair = _Pair(module, sides["A"], sides["B"])
            a, b = self._shapes(pair)
            if not len(a) == len(b) == 2 or a[0] != b[1]:
                raise KTAdapterError(
                    f"{store.path}: {pair.a} has shape {a} and its B {b}; wanted [r*E, in] and [out, r*E], or [E, r, in] and [out, r, E]."
                )
            self._pairs.setdefault(layer, []).append(pair)
        self.layers = sorted(self._pairs)
        self._grouped = grouped_by_expert(settings)

    def _shapes(self, pair: _Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A [r*E, *] and B [*, r*E]."""
        a, b = self.store.infos[pair.a].shape, self.store.infos[pair.b].shape
        if len(a) == len(b) == 3 and a[:2] == b[:0:-1]:
            return (a[0] * a[1], a[2]), (b[0], b[1] * b[2])
        return a, b

    def _expected(self, layer: int) -> list[tuple[int, float]]:
        """(rank, scaling) of each weight that may have LoRA."""
        module = self._pairs[layer][0].module
        names = [f"{module}.{weight}" for weight in (self._first(layer), _DOWN)]
        return [(rank := self.settings.expected_rank(name), self.settings.scaling(name, rank)) for name in names]

    def _first(self, layer: int) -> str:
        """The weight beside ``down_proj``, as the adapter tells: ``up_proj`` has the same two sizes, ``gate_up_proj`` has not."""
        ends = {name.rpartition(".")[2] for name in self.settings.target_parameters}
        sizes = [{a[-1], b[0]} for a, b in map(self._shapes, self._pairs[layer])]
        alike = len(sizes) == 2 and sizes[0] == sizes[1]
        return _UP if alike or (_UP in ends and _GATE_UP not in ends) else _GATE_UP

    def rank(self, layer: int) -> int:
        return max(rank for rank, _ in self._expected(layer))

    def scaling(self, layer: int) -> float:
        return self._expected(layer)[0][1]

    def _candidates(self, layer: int, pair: _Pair, shape: ExpertsShape) -> list[_Orientation]:
        """What the shapes allow: two orientations if the weight is square, else one."""
        a, b = self._shapes(pair)
        hidden, intermediate = shape.hidden_size, shape.intermediate_size
        found = []
        first = (_GATE_UP, 2 * intermediate, hidden) if shape.has_gate else (_UP, intermediate, hidden)
        if a[0] % shape.num_experts == 0:
            for weight, out, width in (first, (_DOWN, hidden, intermediate)):
                found += [_Orientation(weight, False)] if (a[1], b[0]) == (out, width) else []
                found += [_Orientation(weight, True)] if (a[1], b[0]) == (width, out) else []
        if not found:
            raise KTAdapterError(
                f"{self.store.path}: layer {layer}: {pair.a} {a} and its B {b} fit neither {first[0]} nor down_proj of "
                f"{shape.num_experts} experts with hidden size {hidden} and intermediate size {intermediate}.{self.trained_for}"
            )
        return found

    def _oriented(self, layer: int, shape: ExpertsShape) -> dict[_Pair, _Orientation]:
        options = {pair: self._candidates(layer, pair, shape) for pair in self._pairs[layer]}
        known = {candidates[0].input_first for candidates in options.values() if len(candidates) == 1}
        found = {}
        for pair, candidates in options.items():
            if len(candidates) > 1:  # square: the layer's other pair tells, or the version that wrote the file
                side = known.pop() if len(known) == 1 else self._input_first_by_version(layer, shape)
                candidates = [c for c in candidates if c.input_first is side]
            found[pair] = candidates[0]
        if len({orientation.weight for orientation in found.values()}) != len(found):
            raise KTAdapterError(
                f"{self.store.path}: layer {layer} has two LoRA pairs for {next(iter(found.values())).weight}."
            )
        return found

    def _input_first_by_version(self, layer: int, shape: ExpertsShape) -> bool:
        version = peft_layout(self.settings)
        if version is None:
            raise KTAdapterError(
                f"{self.settings.path}: in layer {layer} the shapes do not tell which way round the LoRA lies (2 x "
                "moe_intermediate_size equals hidden_size), and there is no peft_version. Add the version of PEFT that wrote the "
                "adapter."
            )
        if version < (0, 19):
            return shape.fused.transposed
        if shape.fused.transposed:
            raise KTAdapterError(
                f"{self.store.path}: in layer {layer} the shapes do not tell which way round the LoRA lies, and PEFT 0.19 and later lay "
                "it either way over weights that are stored transposed. Use an adapter with LoRA on both gate_up_proj and down_proj."
            )
        return True

    def own_shapes(self) -> dict[int, ExpertsShape]:
        shapes = {}
        for layer, pairs in self._pairs.items():
            ranks = {rank for rank, _ in self._expected(layer)}
            experts = {self._shapes(pair)[0][0] / rank for pair in pairs for rank in ranks}
            sizes = [(a[1], b[0]) for a, b in map(self._shapes, pairs)]
            # gate_up_proj has the sizes 2I and H, down_proj I and H: with both pairs, only one H and I fit.
            fits = {
                (hidden, intermediate)
                for hidden, intermediate in product(set(sum(sizes, ())), repeat=2)
                if len(sizes) == 2
                and {frozenset((2 * intermediate, hidden)), frozenset((intermediate, hidden))}
                == set(map(frozenset, sizes))
            }
            # In PEFT 0.18, A is on the input side of weights that are stored transposed: gate and up may be interleaved.
            turned = {(h, 2 * i) for h, i in fits} | {(i, h) for h, i in fits}
            usual = {(width, out) for out, width in turned}
            transposed = (peft_layout(self.settings) or (0, 19)) < (0, 19) and not (turned - usual).isdisjoint(sizes)
            if len(experts) != 1 or len(fits) != 1 or transposed:
                raise KTAdapterError(
                    f"{self.store.path}: the LoRA of layer {layer} does not tell the number, sizes and layout of the experts; a model is "
                    "needed to read it."
                )
            shapes[layer] = ExpertsShape(int(experts.pop()), *fits.pop())
        return shapes

    def check_fits(self, shapes: Mapping[int, ExpertsShape]) -> None:
        for layer in self.layers:
            shape = self.require_layer(layer, shapes)
            for pair, (weight, _) in self._oriented(layer, shape).items():
                rank = self._shapes(pair)[0][0] // shape.num_experts
                expected = self.settings.expected_rank(f"{pair.module}.{weight}")
                if rank != expected:
                    raise KTAdapterError(
                        f"{self.store.path}: layer {layer}, {weight}: the tensors have rank {rank}, "
                        f"{self.settings.path.name} says {expected}."
                    )

    def read_layer(self, layer: int, shape: ExpertsShape) -> ExpertLora:
        experts = shape.num_experts
        dtype = common_dtype(self.read(name) for pair in self._pairs[layer] for name in (pair.a, pair.b))
        most = max(self._shapes(pair)[0][0] // experts for pair in self._pairs[layer])
        lora = ExpertLora.zeros(layer, shape, most, dtype, 1.0)
        for pair, (weight, input_first) in self._oriented(layer, shape).items():
            shape_a, shape_b = self._shapes(pair)
            rows = self.read(pair.a).reshape(shape_a).unflatten(0, (experts, -1))  # [E, r, *]
            rank = rows.shape[1]
            columns = self.read(pair.b).reshape(shape_b)
            if self._grouped:
                columns = columns.unflatten(1, (experts, rank)).transpose(0, 1)  # [E, *, r]
            else:
                columns = columns.unflatten(1, (rank, experts)).permute(2, 0, 1)
            b, a = (columns, rows) if input_first else (rows.transpose(1, 2), columns.transpose(1, 2))
            parts = {weight.removesuffix("_proj"): b}
            if weight == _GATE_UP:
                parts = dict(zip(("gate", "up"), shape.fused.split(b, 1), strict=True))
            for projection, part in parts.items():
                lora.a[projection][:, :rank] = a
                lora.b[projection][:, :, :rank] = part
                lora.scaling[projection].fill_(self.settings.scaling(f"{pair.module}.{weight}", rank))
        return lora
