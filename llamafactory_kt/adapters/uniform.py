"""Bringing LoRA into the form that most layouts need: one rank and one alpha."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from tqdm.auto import tqdm

from ..ground.errors import KTAdapterError, name_some
from ..ground.paging import give_back_memory
from ..ground.tensors.stores import all_finite
from .adapter import Adapter
from .expert_lora import ExpertLora, ExpertsShape
from .keys import PEFT_PREFIX, PROJECTIONS, split_module

logger = logging.getLogger(__name__)

PARTS = [f"{projection}_lora_{side}" for projection in PROJECTIONS for side in "ab"]
Layer = dict[str, torch.Tensor]
"""the tensors of :data:`PARTS`: a [E, r, in], b [E, out, r]"""


@dataclass(frozen=True)
class Uniform:
    """An adapter's routed experts with one rank and one scaling, ``lora_alpha / lora_rank``, read layer by layer."""

    adapter: Adapter
    shapes: dict[int, ExpertsShape]
    lora_rank: int
    lora_alpha: float

    @classmethod
    def of(cls, adapter: Adapter, shapes: dict[int, ExpertsShape] | None = None) -> Uniform:
        """Choose the largest rank, and the scaling that most layers share. ``shapes`` are the model's, else the adapter's own.

        Raises:
            KTAdapterError: The adapter does not tell its experts' sizes, or does not fit ``shapes``.
        """
        shapes = shapes or adapter.own_shapes()
        adapter.check_fits(shapes)
        rank = max(adapter.rank(layer) for layer in adapter.layers)
        scaling = Counter(adapter.scaling(layer) for layer in adapter.layers).most_common(1)[0][0] or 1.0
        alpha = scaling * rank
        return cls(adapter, shapes, rank, float(round(alpha)) if abs(alpha - round(alpha)) < 1e-9 else alpha)

    @property
    def num_experts(self) -> int:
        return max(shape.num_experts for shape in self.shapes.values())

    @property
    def num_layers(self) -> int:
        """One more than the highest layer with expert LoRA, as SGLang's converter counts."""
        return max(self.shapes) + 1

    @property
    def numbers(self) -> list[int]:
        """The layers to write, ascending; SGLang needs every layer with routed experts, those without LoRA as zeros."""
        return sorted(self.shapes)

    def layers(self) -> Iterator[tuple[int, Layer]]:
        """Each layer's six stacked tensors, in the adapter's dtype (bfloat16 for zeros).

        Any other scaling than the common one is folded into B; if the dtype cannot hold the product exactly, B is float32.

        Raises:
            KTAdapterError: A layer holds NaN or Inf.
        """
        adapter, common, folded = self.adapter, self.lora_alpha / self.lora_rank, 0
        for number in tqdm(self.numbers, desc="Converting", unit="layer", delay=1.0):
            if number in adapter.layers:
                lora = adapter.read_layer(number, self.shapes[number])
            else:
                lora = ExpertLora.zeros(number, self.shapes[number], self.lora_rank, torch.bfloat16, common)
            tensors: Layer = {}
            for projection in PROJECTIONS:
                a, b = lora.a[projection], lora.b[projection]
                if not bool((lora.scaling[projection] == common).all()):
                    folded += 1
                    b = _narrowed(lora.folded(projection, common), b.dtype)
                tensors[f"{projection}_lora_a"], tensors[f"{projection}_lora_b"] = _padded(a, b, self.lora_rank)
            if not all(map(all_finite, tensors.values())):
                raise KTAdapterError(f"{adapter.expert_file}: layer {number} holds NaN or Inf.")
            yield number, tensors
            del tensors, lora, a, b
            give_back_memory()
        if folded:
            logger.warning(
                "%d of %d projections had another scaling than %g; it was folded into their B.",
                folded, 3 * len(adapter.layers), common,
            )  # fmt: skip


class UniformRest:
    """An adapter's LoRA besides the routed experts, with one rank and one scaling.

    Raises:
        KTAdapterError: There is no other tensor, or one that is not half of a LoRA pair (DoRA, biases, saved modules).
    """

    def __init__(self, adapter: Adapter):
        self._adapter = adapter
        self._pairs = _pairs(adapter)
        self.rank = max(adapter.store.infos[a].shape[0] for a, _ in self._pairs.values())
        self.targets = {module.rpartition(".")[2] for module in self._pairs}
        self.names = [name for module in self._pairs for name in _names(module)]
        """of the tensors, in PEFT's spelling"""

    def tensors(self, rank: int, alpha: float) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, A [rank, in] or B [out, rank]) of each pair.

        Args:
            rank: at least :attr:`rank`; smaller ones are padded with zeros.
            alpha: any other scaling than ``alpha / rank`` is folded into B.
        """
        common, settings = alpha / rank, self._adapter.settings
        for module, names in self._pairs.items():
            a, b = map(self._adapter.read, names)
            factor = settings.scaling(module, a.shape[0]) / common
            b = b if factor == 1 else _narrowed(b.float() * factor, b.dtype)
            yield from zip(_names(module), _padded(a, b, rank), strict=True)


def _names(module: str) -> list[str]:
    return [f"{PEFT_PREFIX}{module}.lora_{side}.weight" for side in "AB"]


def _pairs(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """module -> A and B of the tensors that are not of routed experts."""
    parts: dict[str, dict[str, str]] = {}
    for name in adapter.other_names:
        module, part = split_module(name)
        parts.setdefault(module, {})[part] = name
    halves = ("lora_A.weight", "lora_B.weight")
    wrong = [name for own in parts.values() if set(own) != set(halves) for name in own.values()]
    if wrong or not parts:
        found = (
            f"{len(wrong)} tensors that are not, first {name_some(wrong, 2)}" if wrong else "none besides the experts'"
        )
        raise KTAdapterError(
            f"{adapter.store.path}: for SGLang (--format sglang-merged) there must be LoRA pairs besides the experts; found {found}."
        )
    return {module: (own[halves[0]], own[halves[1]]) for module, own in parts.items()}


def _padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [..., rank, in] and B [..., out, rank] with zeros for the ranks they do not have."""
    extra = rank - a.shape[-2]
    return (pad(a, (0, 0, 0, extra)), pad(b, (0, extra))) if extra else (a.contiguous(), b.contiguous())


def _narrowed(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value`` (float32) in a narrower dtype if that holds it exactly, else unchanged."""
    narrow = value.to(dtype)
    return narrow if torch.equal(narrow.float(), value) else value
