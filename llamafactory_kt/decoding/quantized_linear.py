"""``kt_dense``: the linear layers around the experts as integers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from ..ground.errors import KTModelError
from ..ground.paging import are_of_a_file, drop_pages, empty_in_huge_pages
from ..model.experts_module import KTExperts
from ..native.cached_dense import CachedDense
from ..native.packed import PackedWeight, Packing
from ..native.packed_block import block_nbytes, quantize_into, weights_in
from ..native.quantized_tensor import QuantizedTensor
from .latent_attention import up_projections

_LAYER = re.compile(r"\.\d+\.")
SMALL = 2**16
"""weights; layers with fewer are read in no time, and are often such that precision matters: gates of shared experts, for one"""


def experts_of(model: nn.Module) -> dict[str, int]:
    """name of each experts module -> its experts, of a loaded model."""
    return {name: module.num_experts for name, module in model.named_modules() if isinstance(module, KTExperts)}


def quantizable(model: nn.Module, experts: Mapping[str, int]) -> set[nn.Module]:
    """The linear layers of the language model and its output layer: not those of vision and audio towers, the routers, small ones, and the
    up-projections of latent attention.

    Args:
        model: after :func:`keep_latents`; it may be empty.
        experts: as :func:`experts_of`.
    """
    routed = set(experts.values())
    layers = _LAYER.split(next(iter(experts)))[0]  # model.language_model.layers, transformer.blocks
    text = model.get_submodule(layers.rpartition(".")[0])
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found: set[nn.Module] = {
        module
        for module in (*text.modules(), output)
        if isinstance(module, nn.Linear)
        and module.weight.numel() >= SMALL
        and module.out_features not in routed
        and module.in_features % 2 == 0
    }
    return found - up_projections(model)


def quantize_weight(layer: nn.Linear, bits: int, *, copy: bool, cached: CachedDense | None) -> None:
    """Replace the weight by integers, in huge pages. One that another module shares stays there as it is.

    Args:
        copy: those that are cached, too; otherwise they stay where they are mapped.
        cached: has the integers of some weights.

    Raises:
        KTModelError: It has values that are not finite.
    """
    plain = layer.weight.detach()
    if isinstance(plain, QuantizedTensor):
        return
    packing, shapes = Packing(f"int{bits}"), [(layer.out_features, layer.in_features)]
    block = cached.block_of(plain) if cached is not None else None
    if block is None:
        packed = _quantized(plain, packing)
    elif copy:
        packed = weights_in(empty_in_huge_pages(block.shape, torch.uint8).copy_(block), packing, shapes)[0]
        drop_pages(block)
    else:
        packed = weights_in(block, packing, shapes)[0]
    layer.weight = nn.Parameter(QuantizedTensor(packed, plain.dtype), requires_grad=False)
    if are_of_a_file(plain):
        drop_pages(plain)


def _quantized(plain: torch.Tensor, packing: Packing) -> PackedWeight:
    rows, cols = plain.shape
    try:
        block = empty_in_huge_pages((block_nbytes(packing, [(rows, cols)]),), torch.uint8)
        return quantize_into(block, packing, [plain])[0]
    except ValueError as error:
        raise KTModelError(
            f"A linear layer with {rows} x {cols} weights has {error}. Download or copy the checkpoint again."
        ) from error
