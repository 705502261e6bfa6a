"""The check of a load with a transformers, PEFT or torch that nobody has tested (:func:`..ground.internals.untested`).

Three tokens of the first layer with routed experts go through its engine, and in float32 through the model's own experts class, whose
weights transformers' own rules make of the checkpoint's tensors. Rules, classes and kernels that have changed their meaning show here.
"""

from __future__ import annotations

import logging
from copy import copy

import torch
from torch import nn

from ..adapters import AdapterSet, ExpertLora
from ..checkpoint.contract import own_forward
from ..checkpoint.opening import MoEModel
from ..engines.base import Engine
from ..ground.errors import KTModelError, first_line
from ..ground.internals import untested
from ..peft_side.model_names import CheckpointNames

TOKENS = 3
ADVICE = "Install tested versions; llamafactory-kt doctor names them"
logger = logging.getLogger(__name__)


class UntestedCheck:
    """What the first layer's experts should answer, computed while the model still has its own.

    Args:
        merged: adapters that are merged into the experts' weights.

    Raises:
        KTModelError: It cannot be computed with these versions.
    """

    def __init__(self, opened: MoEModel, merged: AdapterSet | None):
        first = opened.experts[0]
        shape, self._layer = first.shape, first.layer
        generator = torch.Generator(device="cpu").manual_seed(0)
        with torch.device("cpu"):  # the model is being built on another, and in its own dtype
            self._hidden = torch.randn(TOKENS, shape.hidden_size, generator=generator, dtype=torch.float32)
            slots = torch.arange(TOKENS * first.num_experts_per_tok).view(TOKENS, -1)
            self._index = slots % shape.num_experts
            self._weights = torch.rand(slots.shape, generator=generator, dtype=torch.float32) + 0.5
            lora = merged.read_layer(first.layer, shape) if merged is not None else None
            try:
                self._wanted = self._compute(opened, opened.model.get_submodule(first.name), lora)
            except Exception as error:  # of any kind: the libraries have changed in a way nobody knows
                raise KTModelError(
                    f"Untested: {', '.join(untested())}; and the check of layer {self._layer} fails with "
                    f"{type(error).__name__}: {first_line(error)}. {ADVICE}."
                ) from error

    @torch.no_grad()
    def _compute(self, opened: MoEModel, module: nn.Module, lora: ExpertLora | None) -> torch.Tensor:
        numbers, index = self._index.unique(return_inverse=True)
        first = opened.experts[0]
        layer = opened.layout.layer(first.name)
        tensors = layer.by_name(numbers.tolist())
        weights = {
            name.rpartition(".")[2]: weight for name, weight in CheckpointNames(opened.model).converted(tensors).items()
        }
        if lora is not None:
            for place, number in enumerate(numbers.tolist()):
                for name in first.weights:
                    weights[name][place] += lora.fused_delta(name, first.shape.fused, number)
        own = copy(module)
        own._parameters = {name: nn.Parameter(weight, False) for name, weight in weights.items()}
        own.num_experts = len(numbers)  # type: ignore[assignment]
        if first.presorted:  # the tokens are in the order of their experts
            alone: torch.Tensor = own_forward(module)(own, self._hidden)
            return alone * self._weights
        wanted: torch.Tensor = own_forward(module)(own, self._hidden, index, self._weights)
        return wanted

    def compare(self, engine: Engine, dtype: torch.dtype) -> None:
        """Ask the engine of that layer, in the model's dtype, and warn that the versions are untested.

        Raises:
            KTModelError: It is farther from float32 than it may be.
        """
        with torch.inference_mode():
            found = engine.forward(self._hidden.to(dtype), self._index, self._weights).float()
        error = float((found - self._wanted).norm() / self._wanted.norm())
        told = f"{', '.join(untested())}: {TOKENS} tokens of layer {self._layer}'s experts are {error:.2g} from float32"
        if not error <= engine.bounds.relative:
            raise KTModelError(f"Untested: {told}; {engine.bounds.relative:.2g} are allowed. {ADVICE}.")
        logger.warning("Untested: %s, as they should be.", told)
