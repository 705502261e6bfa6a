"""The layers around the experts, on the CPU, with weights packed as oneDNN's bfloat16 kernels want them.

``torch.nn.functional.linear`` has oneDNN work on plain weights in every call. On two cores, packing made a token of a
model like DeepSeek-V2-Lite a sixth faster, of which the output layer is the largest part.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..used_memory import forget_pages, give_back_memory
from .crossing import SHARED_EXPERTS
from .module import KTExperts
from .onednn_engine import linear, onednn_problem, pack
from .openmp import release_team
from .packed_lora import PackedLora, take_over

SMALLEST = 2**20
"""bytes of a weight; smaller ones are in the CPU's cache, and calling is what they cost"""


class PackedLinear(nn.Linear):
    """A linear layer for inference whose weight has its shape and type, and no address: only oneDNN can read it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], bfloat16."""
        if input.dtype != torch.bfloat16:
            raise RuntimeError(f"expected bfloat16, got {input.dtype}")
        return linear(input, self.weight, self.bias)


def pack_linears(model: nn.Module) -> None:
    """Pack the weights of attention, dense MLPs, shared experts and the output layer, those that are on the CPU in bfloat16.

    Routers stay as they are, as models read their weights themselves; so do weights that two layers share, and those
    below DoRA.
    """
    if onednn_problem() is not None:
        return
    for layer in list(_linears(model)):
        plain = layer.weight.detach()
        layer.weight = nn.Parameter(pack(plain), requires_grad=False)
        layer.__class__ = PackedLinear  # PEFT and hooks hold the object
        forget_pages(plain)
        del plain
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), PackedLinear):
            take_over(module)
    give_back_memory()
    release_team()


@contextlib.contextmanager
def changing_layers(model: nn.Module, weights_are_read: bool) -> Iterator[None]:
    """While PEFT changes a model's layers; one that had packed weights has them afterwards, where they can be packed then.

    Args:
        weights_are_read: give the layers their plain weights meanwhile.
    """
    packed: list[nn.Linear] = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for layer in packed if weights_are_read else ():
        layer.weight = nn.Parameter(layer.weight.detach().to_dense(), requires_grad=False)
        layer.__class__ = nn.Linear
    try:
        yield
    finally:
        if packed:
            pack_linears(model)


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    left = {id(module) for module in _read_by_others(model)}
    every = (p for _, p in model.named_parameters(remove_duplicate=False))
    addresses = Counter(p.data_ptr() for p in every if p.layout == torch.strided)
    for module in model.modules():
        if type(module) is nn.Linear and id(module) not in left:
            weight = module.weight
            plain = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.is_contiguous()
            if plain and weight.nbytes >= SMALLEST and addresses[weight.data_ptr()] == 1:
                yield module


def _read_by_others(model: nn.Module) -> Iterator[nn.Module]:
    """Routers, LoRA itself, and what PEFT's variants of LoRA (DoRA, for one) read the weight of in every call."""
    for block in model.modules():
        children = dict(block.named_children())
        if any(isinstance(child, KTExperts) for child in children.values()):
            beside = (child for name, child in children.items() if name not in SHARED_EXPERTS)
            yield from (module for child in beside for module in child.modules())
        if isinstance(block, LoraLayer):
            yield from (*block.lora_A.values(), *block.lora_B.values())
            if any(type(variant) is not PackedLora for variant in block.lora_variant.values()):
                yield block.get_base_layer()
