"""PEFT's LoRA on bfloat16 layers: the same sum, in fewer steps and with less memory traffic.

On the CPU, reading a layer's weight has just evicted everything else from the caches, so that each step of Python's and PyTorch's is
expensive whatever it computes. PEFT's forward takes dozens, and copies a prompt's input to float32; here one compiled function takes
them, the layer's own product included. On a GPU each of PEFT's steps is a kernel launch, which takes longer than the kernel.

Subclasses PEFT's ``Linear`` and reads its private state; other versions of PEFT keep their own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from ..ground.internals import TESTED, Internal
from ..matmul.linear import computed_in, numbers, product
from ..matmul.packed_weight import for_kernels

FEW_ROWS = 64
"""with fewer rows the calls dominate, and float32 is cheaper to call; with more, memory bandwidth does"""
INTERNAL = Internal("peft-lora", "peft", TESTED["peft"])


class InferenceLora(Linear):  # type: ignore[misc]
    """PEFT's layer for inference: ``y + scaling * (x @ A.T) @ B.T``, for each active adapter.

    On the CPU in float32 for few rows, as PEFT computes it; for more of them, and on a GPU, in what the layer itself computes
    in, with sums in float32 inside each product. Adapters may be disabled and changed as PEFT does that, but not merged.
    """

    _pairs: dict[torch.dtype, dict[str, tuple[Tensor, Tensor]]]
    """dtype of the computation -> adapter -> A [r, in], and B transposed, [r, out], which is read faster"""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out], bfloat16."""
        result: Tensor
        if args or kwargs:  # a batch of several adapters, for one
            result = super().forward(x, *args, **kwargs)
            return result
        base = self.base_layer
        if self._disable_adapters:
            result = base(x)
            return result
        rows = x.numel() // x.shape[-1]
        own = torch.bfloat16 if x.is_cuda else computed_in(rows)
        dtype = torch.float32 if rows < FEW_ROWS and not x.is_cuda else own
        pairs = self._pairs[dtype]
        names = [name for name in self.active_adapters if name in pairs]
        factors, scaling = [pairs[name] for name in names], [self.scaling[name] for name in names]
        if x.is_cuda:
            return _add(x.reshape(-1, x.shape[-1]), base(x), factors, scaling)
        wide, threads, weight = own == torch.float32, torch.get_num_threads(), for_kernels(base.weight)
        given = (x, weight, base.bias, factors, scaling, wide, dtype == torch.float32, numbers(weight), threads)
        result = _on_cpu()(*given)
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> InferenceLora:
        """Move, as ``model.to()`` does it."""
        super()._apply(*args, **kwargs)
        take_over(self)
        return self

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """PEFT's merging would read and write weights that may be packed."""
        raise RuntimeError(
            "This LoRA is set up for inference and cannot be merged. kt_merge_adapter: true merges it while the model is loaded."
        )


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[tuple[Tensor, Tensor]], scaling: list[float], wide: bool,
    lora_wide: bool, numbers: Tensor, threads: int,
) -> Tensor:  # fmt: skip
    """A layer on the CPU, as :func:`~llamafactory_kt.matmul.linear.product` computes it, and its LoRA, which may be in float32 (wide) where it is not."""
    rows = x.reshape(-1, x.shape[-1])
    if wide:
        rows = rows.float()
    result = product(rows, weight, bias, wide, numbers, threads)
    if lora_wide:
        rows, result = rows.float(), result.float()
    return _add(rows, result, factors, scaling).to(x.dtype).view(x.shape[:-1] + result.shape[-1:])


def _add(x: Tensor, result: Tensor, factors: list[tuple[Tensor, Tensor]], scaling: list[float]) -> Tensor:
    """x [n, in], result [..., out], which the adapters' LoRA is added to in place."""
    sums = result.view(-1, result.shape[-1])
    for number, (a, b) in enumerate(factors):
        sums.addmm_(F.linear(x, a), b, alpha=scaling[number])
    return result


@cache
def _on_cpu() -> Callable[..., Tensor]:
    return torch.jit.script(_linear)  # type: ignore[no-any-return]


def take_over(layer: LoraLayer) -> None:
    """Make an :class:`InferenceLora` of a layer whose adapters all are plain LoRA on a linear layer; others are left."""
    if not INTERNAL.usable:
        return
    plain = type(layer) in (Linear, InferenceLora) and isinstance(layer.get_base_layer(), nn.Linear)
    if plain and not layer.lora_variant and not any(layer.lora_bias.values()):
        weight = layer.get_base_layer().weight
        layer._pairs = {
            dtype: {
                name: (a.weight.detach().to(dtype), layer.lora_B[name].weight.detach().to(dtype).T.contiguous())
                for name, a in layer.lora_A.items()
            }
            for dtype in ({torch.bfloat16} if weight.is_cuda else {torch.float32, computed_in(FEW_ROWS)})
        }
        layer.__class__ = InferenceLora  # the model and hooks hold the object; at last, since it reads the pairs
