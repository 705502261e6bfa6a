"""The linear layers around the experts, prepared for inference: weights in the layout that the CPU reads fastest, LoRA in few steps."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..ground.paging import are_of_a_file, drop_pages, give_back_memory
from ..matmul.layouts import SMALLEST, Size, faster_packed, is_packed, placing, size_of, unpack
from ..matmul.linear import PreparedLinear
from ..matmul.mkldnn_blob import as_parameter
from ..matmul.mkldnn_ops import onednn_problem
from ..matmul.openmp import release_team
from ..model.experts_module import KTExperts
from ..model.shared_overlap import SHARED_EXPERTS
from .lora_linear import take_over
from .patch_embedding import cut_patches_by_convolutions, cut_patches_by_products

_SAMPLES = 2
"""layers of each size that are timed"""


def prepare_layers(model: nn.Module) -> None:
    """Prepare the bfloat16 layers of attention, dense MLPs, shared experts and the output layer: weights on the CPU get their fastest
    layout, and LoRA, also on a GPU, is computed in fewer steps. Vision towers, of any dtype, cut patches by a product.

    Routers stay as they are, since models read their weights themselves; so do weights that two layers share, and those under DoRA.

    Args:
        model: without PEFT's wrapper around it.
    """
    cut_patches_by_products(model)
    on_cpu = onednn_problem() is None
    if on_cpu:
        _place_weights(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            if _is_bfloat16(base, "cuda") or (on_cpu and _is_bfloat16(base, "cpu")):
                take_over(module)
    give_back_memory()
    release_team()


def _place_weights(model: nn.Module) -> None:
    layers: dict[Size, list[nn.Linear]] = defaultdict(list)
    for layer in _linears(model):
        layers[size_of(layer.weight)].append(layer)
    packed = faster_packed(layers, lambda: {size: [x.weight for x in same[:_SAMPLES]] for size, same in layers.items()})
    for size, same in layers.items():
        place = placing(size, len(same), size in packed)
        for number, layer in enumerate(same):
            plain = layer.weight.detach()
            placed = as_parameter(place(number, plain))
            layer.__class__ = (
                PreparedLinear  # PEFT and hooks hold the object; before the weight, which it alone can read
            )
            layer.weight = placed
            if are_of_a_file(plain):  # others may still show it: a state_dict(), for one
                drop_pages(plain)
            del plain


@contextlib.contextmanager
def changing_layers(model: nn.Module, *, prepared: bool, weights_are_read: bool) -> Iterator[None]:
    """Around a change of a model's layers by PEFT.

    Args:
        prepared: whether the model's layers are, so that new ones become so, too.
        weights_are_read: PEFT will read weights, so packed ones are unpacked before.
    """
    try:
        cut_patches_by_convolutions(model)
        if weights_are_read:
            packed: list[nn.Linear] = [
                m for m in model.modules() if isinstance(m, PreparedLinear) and is_packed(m.weight)
            ]
            for layer in packed:
                layer.weight = as_parameter(unpack(layer.weight.detach()))
                layer.__class__ = nn.Linear
        yield
    finally:
        if prepared:
            prepare_layers(model)


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    left = {id(module) for module in _read_by_others(model)}
    every = (p for _, p in model.named_parameters(remove_duplicate=False))
    addresses = Counter(p.data_ptr() for p in every if p.layout == torch.strided)
    for module in model.modules():
        if id(module) in left:
            continue
        if type(module) is nn.Linear and _is_bfloat16(module, "cpu"):
            weight = module.weight
            if weight.nbytes >= SMALLEST and weight.is_contiguous() and addresses[weight.data_ptr()] == 1:
                yield module


def _is_bfloat16(layer: nn.Module, device: str) -> bool:
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.device.type == device and weight.dtype == torch.bfloat16


def _read_by_others(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose weights others read: routers, LoRA itself, and base layers of PEFT's LoRA variants, such as DoRA."""
    for block in model.modules():
        children = dict(block.named_children())
        if any(isinstance(child, KTExperts) for child in children.values()):
            beside = (child for name, child in children.items() if name not in SHARED_EXPERTS)
            yield from (module for child in beside for module in child.modules())
        if isinstance(block, LoraLayer):
            yield from (*block.lora_A.values(), *block.lora_B.values())
            if block.lora_variant:
                yield block.get_base_layer()
