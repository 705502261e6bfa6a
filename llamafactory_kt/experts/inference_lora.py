"""PEFT's LoRA on bfloat16 layers: the same sum, in fewer steps and less memory traffic.

On the CPU, a layer's weights have just been read from end to end when its LoRA comes, so that caches hold neither Python's own
instructions nor torch's, and each step costs 60 to 110 microseconds whatever it computes. PEFT's own forward takes some forty of
Python's and seven of torch's, and for prompts makes a float32 copy of the input. On a GPU those seven are kernels to be
launched, which takes longer than computing them: on an H100, they made a token take twice as long as one without LoRA.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch.nn import functional as F

from .products import PreparedLinear, computed_in

FEW_ROWS = 64
"""with fewer, what the products cost is calling them, and float32's cost less to call; with more, it is reading memory"""


class InferenceLora(Linear):  # type: ignore[misc]
    """PEFT's layer for inference: ``y + scaling * (x @ A.T) @ B.T``, for each active adapter.

    On the CPU in float32 for few rows, as PEFT computes it; for more of them, and on a GPU, in what the layer itself computes
    in, with sums in float32 inside each product. Adapters may be disabled and changed as PEFT does that, but not merged.
    """

    _pairs: dict[torch.dtype, dict[str, tuple[torch.Tensor, torch.Tensor]]]
    """in each dtype that is computed in, of each adapter: A [r, in], and B [r, out] with its columns side by side, which
    is read much faster so"""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] -> [..., out], bfloat16."""
        result: torch.Tensor
        if args or kwargs:  # a batch of several adapters, for one
            result = super().forward(x, *args, **kwargs)
            return result
        if self._disable_adapters:
            result = self.base_layer(x)
            return result
        rows = x.reshape(-1, x.shape[-1])
        product = torch.bfloat16 if x.is_cuda else computed_in(len(rows))
        if product == torch.float32 and isinstance(self.base_layer, PreparedLinear):
            rows = rows.float()
        result = self.base_layer(rows.view(x.shape))
        dtype = torch.float32 if len(rows) < FEW_ROWS and not x.is_cuda else product
        rows, sums = rows.to(dtype), result.view(-1, result.shape[-1]).to(dtype)
        pairs = self._pairs[dtype]
        for name in self.active_adapters:
            if name in pairs:
                a, b = pairs[name]
                sums.addmm_(F.linear(rows, a), b, alpha=self.scaling[name])
        return sums.to(x.dtype).view(result.shape)

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


def take_over(layer: LoraLayer) -> None:
    """Make an :class:`InferenceLora` of a layer whose adapters all are plain LoRA on a linear layer; others are left."""
    if type(layer) in (Linear, InferenceLora) and not layer.lora_variant and not any(layer.lora_bias.values()):
        layer.__class__ = InferenceLora  # the model and hooks hold the object
        weight = layer.get_base_layer().weight
        layer._pairs = {
            dtype: {
                name: (a.weight.detach().to(dtype), layer.lora_B[name].weight.detach().to(dtype).T.contiguous())
                for name, a in layer.lora_A.items()
            }
            for dtype in ({torch.bfloat16} if weight.is_cuda else {torch.float32, computed_in(FEW_ROWS)})
        }
