"""The linear layers around the experts, prepared for inference: on the CPU they are the native kernels' calls, LoRA included."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..ground.paging import are_of_a_file, drop_pages, empty_in_huge_pages, give_back_memory
from ..native.cached_dense import CachedDense
from ..native.fused_linear import fits
from ..native.library import library
from ..native.openmp import release_team
from ..tracing.layers import trace_layers
from .fused_norm import fuse_norms
from .latent_attention import keep_latents
from .lora_linear import take_over
from .native_linear import NativeLinear, forget_fused
from .patch_embedding import cut_patches_by_convolutions, cut_patches_by_products
from .quantized_linear import experts_of, quantizable, quantize_weight


def prepare_layers(
    model: nn.Module, *, copy: bool, bits: int | None = None, cached: CachedDense | None = None
) -> None:  # fmt: skip
    """Prepare the linear layers: those on the CPU, of any dtype that the native kernels read, and PEFT's LoRA, also on a GPU in
    bfloat16. Vision towers, of any dtype, cut patches by a product.

    Args:
        model: without PEFT's wrapper around it.
        copy: put weights that lie in mapped files into huge pages. Those that two modules share stay.
        bits: 4 or 8: quantize the language model's weights that :func:`quantizable` finds.
        cached: has some of them.
    """
    keep_latents(model)
    quantized = quantizable(model, experts_of(model)) if bits else set()
    cut_patches_by_products(model)
    native = not isinstance(library(), str)
    shared = _shared(model)
    inside_lora = {
        id(part)
        for m in model.modules()
        if isinstance(m, LoraLayer)
        for part in (*m.lora_A.values(), *m.lora_B.values())
    }
    for module in model.modules():
        if native and isinstance(module, nn.Linear) and id(module) not in inside_lora and _is_plain(module):
            forget_fused(module)
            if bits and module in quantized:
                quantize_weight(module, bits, copy=copy, cached=cached)
            elif copy and module.weight.data_ptr() not in shared:
                _copy_weight(module)
            module.__class__ = NativeLinear  # PEFT and hooks hold the object
        if isinstance(module, LoraLayer):
            weight = getattr(module.get_base_layer(), "weight", None)
            if weight is not None and (weight.dtype == torch.bfloat16 if weight.is_cuda else native):
                take_over(module)
    fuse_norms(model)
    trace_layers(model)
    give_back_memory()
    release_team()


@contextlib.contextmanager
def changing_layers(
    model: nn.Module, *, prepared: bool, copy: bool, bits: int | None = None, cached: CachedDense | None = None
) -> Iterator[None]:  # fmt: skip
    """Around a change of a model's layers by PEFT.

    Args:
        prepared: whether the model's layers are, so that new ones become so, too.
        copy, bits, cached: as in :func:`prepare_layers`.
    """
    try:
        cut_patches_by_convolutions(model)
        yield
    finally:
        if prepared:
            prepare_layers(model, copy=copy, bits=bits, cached=cached)


def _is_plain(layer: nn.Linear) -> bool:
    return type(layer) in (nn.Linear, NativeLinear) and fits(layer.weight)


def _copy_weight(layer: nn.Linear) -> None:
    plain = layer.weight.detach()
    if plain.is_contiguous() and are_of_a_file(plain):
        placed = empty_in_huge_pages(tuple(plain.shape), plain.dtype).copy_(plain)
        layer.weight = nn.Parameter(placed, requires_grad=False)
        drop_pages(plain)  # others may still show it: a state_dict(), for one


def _shared(model: nn.Module) -> set[int]:
    """Addresses of weights that several modules have."""
    addresses = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    return {address for address, count in addresses.items() if count > 1}
