"""Bringing an adapter into the form most layouts ask for: one rank and one alpha for all routed experts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from tqdm.auto import tqdm

from ..ground.errors import KTAdapterError
from ..ground.paging import give_back_memory
from ..ground.tensor_files import all_finite
from .adapter import Adapter, ExpertsShape
from .keys import PROJECTIONS

logger = logging.getLogger(__name__)

Layer = dict[str, torch.Tensor]
"""``gate_lora_a`` [E, r, H], ``gate_lora_b`` [E, I, r], and the same for up and down (a [E, r, I], b [E, H, r])"""


@dataclass(frozen=True)
class Uniform:
    """An adapter's routed experts with one rank and one scaling, ``lora_alpha / lora_rank``, read layer by layer."""

    adapter: Adapter
    shapes: dict[int, ExpertsShape]
    lora_rank: int
    lora_alpha: float

    @classmethod
    def of(cls, adapter: Adapter, shapes: dict[int, ExpertsShape] | None = None) -> Uniform:
        """Choose the largest rank, and the scaling that most layers share.

        Raises:
            KTAdapterError: The adapter does not tell its experts' sizes, or it does not fit ``shapes``.
        """
        shapes = shapes or adapter.own_shapes()
        adapter.check_fits(shapes)
        rank = max(adapter.rank(layer) for layer in adapter.layers)
        scaling = Counter(adapter.scaling(layer) for layer in adapter.layers).most_common(1)[0][0]
        alpha = scaling * rank
        return cls(adapter, shapes, rank, float(round(alpha)) if abs(alpha - round(alpha)) < 1e-9 else alpha)

    @property
    def num_experts(self) -> int:
        return max(shape.num_experts for shape in self.shapes.values())

    @property
    def num_layers(self) -> int:
        """One more than the highest layer with expert LoRA, as the converter for SGLang counts."""
        return max(self.numbers) + 1

    @property
    def numbers(self) -> list[int]:
        """The layers to write, ascending: those of ``shapes``, with zeros where the adapter has no expert LoRA. SGLang
        looks for every layer with routed experts that the model has."""
        return sorted(self.shapes)

    def layers(self) -> Iterator[tuple[int, Layer]]:
        """Each layer's six stacked tensors, in the adapter's dtype (bfloat16 where it has none).

        A scaling other than the common one is folded into B; where the dtype cannot hold the product, that B is float32.
        """
        common, folded = self.lora_alpha / self.lora_rank, 0
        for number in tqdm(self.numbers, desc="Converting", unit="layer", delay=1.0):
            if number not in self.adapter.layers:
                yield number, self._zeros(number)
                continue
            lora = self.adapter.read_layer(number, self.shapes[number])
            tensors: Layer = {}
            for projection in PROJECTIONS:
                value = lora.b[projection]
                if not bool((lora.scaling[projection] == common).all()):
                    folded += 1
                    value = narrowed(lora.folded(projection, common), value.dtype)
                extra = self.lora_rank - lora.rank
                a = lora.a[projection]
                tensors[f"{projection}_lora_a"] = pad(a, (0, 0, 0, extra)) if extra else a.contiguous()
                tensors[f"{projection}_lora_b"] = pad(value, (0, extra)) if extra else value.contiguous()
            if not all(map(all_finite, tensors.values())):
                raise KTAdapterError(f"{self.adapter.expert_file}: layer {number} holds NaN or Inf.")
            yield number, tensors
            del tensors, lora, value, a
            give_back_memory()
        if folded:
            logger.warning(
                "%d of %d projections had another scaling than %g; it was folded into their B.",
                folded, 3 * len(self.adapter.layers), common,
            )  # fmt: skip

    def _zeros(self, number: int) -> Layer:
        shape, rank = self.shapes[number], self.lora_rank
        tensors: Layer = {}
        for projection in PROJECTIONS:
            out, size = shape.projection(projection)
            tensors[f"{projection}_lora_a"] = torch.zeros(shape.num_experts, rank, size, dtype=torch.bfloat16)
            tensors[f"{projection}_lora_b"] = torch.zeros(shape.num_experts, out, rank, dtype=torch.bfloat16)
        return tensors


def narrowed(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value`` (float32) in a narrower dtype where that holds it exactly, else as it is."""
    narrow = value.to(dtype)
    return narrow if torch.equal(narrow.float(), value) else value
