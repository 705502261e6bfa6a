"""PEFT's LoRA for inference: the same sum in fewer steps.

On the CPU, a layer and its LoRA are one call of the native kernels. On a GPU each of PEFT's steps is a kernel launch, which takes longer
than the kernel. Subclasses PEFT's ``Linear`` and reads its private state; other versions of PEFT keep their own forward.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from ..ground.internals import TESTED, Internal
from ..native.fused_linear import Factors
from .native_linear import forget_fused, fused_linear

INTERNAL = Internal("peft-lora", "peft", TESTED["peft"])


class InferenceLora(Linear):  # type: ignore[misc]
    """PEFT's layer for inference: ``y + scaling * (x @ A.T) @ B.T``, for each active adapter.

    On the CPU with float32 sums, rounded once; on a GPU in bfloat16, with float32 sums inside each product. Adapters may be disabled and
    changed as PEFT does that, but not merged.
    """

    _pairs: dict[str, tuple[Tensor, Tensor]]
    """on a GPU: adapter -> A [r, in], and B transposed, [r, out], which is read faster"""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        result: Tensor
        if args or kwargs or (torch.compiler.is_compiling() and not x.is_cuda):  # a batch of several adapters, for one
            result = super().forward(x, *args, **kwargs)
            return result
        if self._disable_adapters:
            result = self.base_layer(x)
            return result
        key = self.active()
        names = tuple(name for name, _ in key)
        if x.is_cuda:
            return self._on_gpu(x, names)
        fused = fused_linear(self.base_layer, self, x, key, lambda: [self.factors(name) for name in names])
        result = fused(x) if fused is not None else super().forward(x)
        return result

    def active(self) -> tuple[tuple[str, float], ...]:
        """The adapters that are added, and their scalings."""
        names = () if self._disable_adapters else self.active_adapters
        return tuple((name, self.scaling[name]) for name in names if name in self.lora_A)

    def factors(self, name: str) -> Factors:
        """Of an adapter."""
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    def _on_gpu(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        result: Tensor = self.base_layer(x)
        rows, sums = x.reshape(-1, x.shape[-1]), result.view(-1, result.shape[-1])
        for name in names:
            a, b = self._pairs[name]
            sums.addmm_(F.linear(rows, a), b, alpha=self.scaling[name])
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> InferenceLora:
        """Move, as ``model.to()`` does it."""
        super()._apply(*args, **kwargs)
        take_over(self)
        return self

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """PEFT's merging would change weights that may be a mapped file's, and calls that are kept would go on with the old LoRA."""
        raise RuntimeError(
            "This LoRA is set up for inference and cannot be merged. kt_merge_adapter: true merges it while the model is loaded."
        )


def take_over(layer: LoraLayer) -> None:
    """Make an :class:`InferenceLora` of a layer whose adapters all are plain LoRA on a linear layer; others are left."""
    if not INTERNAL.usable:
        return
    plain = type(layer) in (Linear, InferenceLora) and isinstance(layer.get_base_layer(), nn.Linear)
    if plain and not layer.lora_variant and not any(layer.lora_bias.values()):
        forget_fused(layer)
        if layer.get_base_layer().weight.is_cuda:
            layer._pairs = {
                name: (a.weight.detach().bfloat16(), layer.lora_B[name].weight.detach().bfloat16().T.contiguous())
                for name, a in layer.lora_A.items()
            }
        layer.__class__ = InferenceLora  # the model and hooks hold the object; at last, since it reads the pairs
