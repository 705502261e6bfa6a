"""Format D: PEFT's ``target_parameters``, LoRA on the fused 3-D expert weights of transformers 5.

``...experts.base_layer.lora_{A,B}.weight`` and ``...experts.lora_{A,B}.weight``, one pair for ``gate_up_proj``
[E, 2I, H] and one for ``down_proj`` [E, H, I]. A's rows are expert-major, B's columns rank-major. PEFT 0.18 lays the
LoRA over the transposed weight (A [r*E, out], B [in, r*E]), 0.19 and later over the weight itself (A [r*E, in],
B [out, r*E]); the sources are ``ParamWrapper`` in ``tuners/lora/layer.py`` of both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..ground.errors import KTAdapterError, name_some
from ..ground.tensor_files import TensorStore
from .adapter import Adapter, ExpertsShape
from .config import LoraSettings
from .expert_lora import ExpertLora
from .keys import PEFT_PREFIX, belongs_to_experts

_NAME = re.compile(
    r"^(?P<module>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\.)?experts)(?P<wrap>(?:\.base_layer)*)"
    r"\.lora_(?P<side>[AB])(?:\.(?!weight$)[^.]+)?\.weight$"
)
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"


class _Pair(NamedTuple):
    module: str
    a: str
    b: str


class _Found(NamedTuple):
    """One pair, understood: which weight it belongs to, and whether A is on the input side (PEFT 0.19)."""

    pair: _Pair
    weight: str
    input_first: bool
    rank: int


def is_target_parameters(store: TensorStore) -> bool:
    """Whether a file holds LoRA on fused expert weights."""
    return any(_NAME.match(name) for name in store.infos)


class TargetParametersAdapter(Adapter):
    """Expert LoRA on fused weights; gate and up share one A or B, and get the same rank.

    Raises:
        KTAdapterError: A half of a pair is missing, or the experts carry something else besides.
    """

    format = "PEFT target_parameters"

    def __init__(self, directory: Path, settings: LoraSettings, store: TensorStore):
        super().__init__(directory, settings, store)
        halves: dict[tuple[int, str, str], dict[str, str]] = {}
        self._names, unknown = [], []
        for name in store.infos:
            match = _NAME.match(name)
            if match is not None:
                module = match["module"].removeprefix(PEFT_PREFIX)
                halves.setdefault((int(match["layer"]), module, match["wrap"]), {})[match["side"]] = name
                self._names.append(name)
            elif belongs_to_experts(name):
                unknown.append(name)
        if unknown:
            raise KTAdapterError(
                f"{store.path}: {len(unknown)} tensors sit on routed experts but are not LoRA on their fused weights, first "
                f"{name_some(unknown, 3)}."
            )
        self._pairs: dict[int, list[_Pair]] = {}
        for (layer, module, _), sides in halves.items():
            if set(sides) != {"A", "B"}:
                raise KTAdapterError(
                    f"{store.path}: {next(iter(sides.values()))} has no other half; the file is incomplete."
                )
            self._pairs.setdefault(layer, []).append(_Pair(module, sides["A"], sides["B"]))

    @property
    def expert_names(self) -> list[str]:
        return self._names

    @property
    def layers(self) -> list[int]:
        return sorted(self._pairs)

    def _expected(self, layer: int) -> list[tuple[int, float]]:
        """(rank, scaling) of each weight that may have LoRA."""
        module = self._pairs[layer][0].module
        names = [f"{module}.{weight}" for weight in (_GATE_UP, _DOWN)]
        return [(rank := self.settings.expected_rank(name), self.settings.scaling(name, rank)) for name in names]

    def rank(self, layer: int) -> int:
        return max(rank for rank, _ in self._expected(layer))

    def scaling(self, layer: int) -> float:
        return self._expected(layer)[0][1]

    def _candidates(self, pair: _Pair, shape: ExpertsShape) -> list[tuple[str, bool]]:
        """(weight, A on the input side) that the shapes allow."""
        a, b = self.store.infos[pair.a].shape, self.store.infos[pair.b].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % shape.num_experts:
            return []
        sizes = {
            _GATE_UP: (2 * shape.intermediate_size, shape.hidden_size),
            _DOWN: (shape.hidden_size, shape.intermediate_size),
        }
        found = []
        for weight, (out, size) in sizes.items():
            found += [(weight, False)] if (a[1], b[0]) == (out, size) else []
            found += [(weight, True)] if (a[1], b[0]) == (size, out) else []
        return found

    def _understand(self, layer: int, shape: ExpertsShape) -> list[_Found]:
        options = {pair: self._candidates(pair, shape) for pair in self._pairs[layer]}
        for pair, candidates in options.items():
            if not candidates:
                a, b = self.store.infos[pair.a].shape, self.store.infos[pair.b].shape
                raise KTAdapterError(
                    f"{self.store.path}: layer {layer}: {pair.a} {a} and its B {b} fit neither gate_up_proj nor down_proj of "
                    f"{shape.num_experts} experts with hidden size {shape.hidden_size} and intermediate size "
                    f"{shape.intermediate_size}.{self.trained_for}"
                )
        known = {c[0][1] for c in options.values() if len(c) == 1}
        found = []
        for pair, candidates in options.items():
            if len(candidates) > 1:  # square: another pair of the same file tells, or the version that wrote it
                side = known.pop() if len(known) == 1 else self._input_first_by_version(layer)
                candidates = [c for c in candidates if c[1] is side]
            weight, input_first = candidates[0]
            rank = self.store.infos[pair.a].shape[0] // shape.num_experts
            found.append(_Found(pair, weight, input_first, rank))
        if len({f.weight for f in found}) != len(found):
            raise KTAdapterError(f"{self.store.path}: layer {layer} has two LoRA pairs for {found[0].weight}.")
        return found

    def _input_first_by_version(self, layer: int) -> bool:
        version = re.match(r"(\d+)\.(\d+)", str(self.settings.raw.get("peft_version") or ""))
        if version is None:
            raise KTAdapterError(
                f"{self.settings.path}: in layer {layer} the shapes do not tell which way round the LoRA lies (2 x "
                "moe_intermediate_size equals hidden_size), and peft_version, which would, is missing. Add the version that "
                "wrote the adapter."
            )
        return (int(version[1]), int(version[2])) >= (0, 19)

    def own_shapes(self) -> dict[int, ExpertsShape]:
        shapes = {}
        for layer, pairs in self._pairs.items():
            ranks = {rank for rank, _ in self._expected(layer)}
            experts = {self.store.infos[pair.a].shape[0] / rank for pair in pairs for rank in ranks}
            sizes = [(self.store.infos[p.a].shape[1], self.store.infos[p.b].shape[0]) for p in pairs]
            # gate_up_proj has the sizes 2I and H, down_proj I and H: with both, only one reading fits.
            fits = {
                (hidden, intermediate)
                for hidden in set(sum(sizes, ()))
                for intermediate in set(sum(sizes, ()))
                if len(sizes) == 2
                and {frozenset((2 * intermediate, hidden)), frozenset((intermediate, hidden))}
                == set(map(frozenset, sizes))
            }
            if len(experts) != 1 or len(fits) != 1:
                raise KTAdapterError(
                    f"{self.store.path}: the LoRA of layer {layer} does not tell the number and sizes of the experts; a model "
                    "is needed to read it."
                )
            shapes[layer] = ExpertsShape(int(experts.pop()), *fits.pop())
        return shapes

    def check_fits(self, shapes: Mapping[int, ExpertsShape]) -> None:
        for layer in self.layers:
            for found in self._understand(layer, self.require_layer(layer, shapes)):
                expected = self.settings.expected_rank(f"{found.pair.module}.{found.weight}")
                if found.rank != expected:
                    raise KTAdapterError(
                        f"{self.store.path}: layer {layer}, {found.weight}: the tensors have rank {found.rank}, "
                        f"{self.settings.path.name} says {expected}."
                    )

    def read_layer(self, layer: int, shape: ExpertsShape) -> ExpertLora:
        experts, rank = shape.num_experts, self.rank(layer)
        a: dict[str, torch.Tensor] = {}
        b: dict[str, torch.Tensor] = {}
        scaling: dict[str, torch.Tensor] = {}
        dtype = self.read(self._pairs[layer][0].a).dtype
        for projection in ("gate", "up", "down"):
            out, size = shape.projection(projection)
            a[projection] = torch.zeros(experts, rank, size, dtype=dtype)
            b[projection] = torch.zeros(experts, out, rank, dtype=dtype)
            scaling[projection] = torch.ones(experts, rank, dtype=torch.float64)
        for found in self._understand(layer, shape):
            # [E, r, *] and [E, *, r], whatever side they are on
            rows = self.read(found.pair.a).unflatten(0, (experts, found.rank))
            columns = self.read(found.pair.b).unflatten(1, (found.rank, experts)).permute(2, 0, 1)
            left, right = (columns, rows) if found.input_first else (rows.transpose(1, 2), columns.transpose(1, 2))
            factor = self.settings.scaling(f"{found.pair.module}.{found.weight}", found.rank)
            parts = (
                {"down": left}
                if found.weight == _DOWN
                else dict(zip(("gate", "up"), left.chunk(2, dim=1), strict=True))
            )
            for projection, part in parts.items():
                a[projection][:, : found.rank] = right
                b[projection][:, :, : found.rank] = part
                scaling[projection].fill_(factor)
        return ExpertLora(layer, a, b, scaling)
