"""``kt_dense``: the linear layers around the experts as integers."""

from __future__ import annotations

import re

import torch
from torch import nn

from ..ground.errors import KTModelError
from ..ground.paging import are_of_a_file, drop_pages, empty_in_huge_pages
from ..model.experts_module import KTExperts
from ..native.packed import Packing, quantize
from ..native.quantized_tensor import QuantizedTensor

_LAYER = re.compile(r"\.\d+\.")
SMALL = 2**16
"""weights; layers with fewer are read in no time, and are often such that precision matters: gates of shared experts, for one"""


def quantizable(model: nn.Module) -> set[nn.Module]:
    """The linear layers of the language model and its output layer: not those of vision and audio towers, the routers, and small ones."""
    experts = {name: module for name, module in model.named_modules() if isinstance(module, KTExperts)}
    routed = {module.num_experts for module in experts.values()}
    layers = _LAYER.split(next(iter(experts)))[0]  # model.language_model.layers, transformer.blocks
    text = model.get_submodule(layers.rpartition(".")[0])
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        module
        for module in (*text.modules(), output)
        if isinstance(module, nn.Linear)
        and module.weight.numel() >= SMALL
        and module.out_features not in routed
        and module.in_features % 2 == 0
    }


def quantize_weight(layer: nn.Linear, bits: int) -> None:
    """Replace the weight by codes, in huge pages. One that another module shares stays there as it is.

    Raises:
        KTModelError: It has values that are not finite.
    """
    plain = layer.weight.detach()
    if isinstance(plain, QuantizedTensor):
        return
    codes, scales = Packing(f"int{bits}").sizes(*plain.shape)
    try:
        packed = quantize(
            plain, bits, empty_in_huge_pages((codes,), torch.uint8), empty_in_huge_pages((scales,), torch.bfloat16)
        )
    except ValueError as error:
        raise KTModelError(
            f"A linear layer with {layer.out_features} x {layer.in_features} weights has {error}. Download or copy the checkpoint again."
        ) from error
    layer.weight = nn.Parameter(QuantizedTensor(packed, plain.dtype), requires_grad=False)
    if are_of_a_file(plain):
        drop_pages(plain)
