"""The part of an adapter that PEFT applies: everything except routed experts, by exact module names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.keys import MLP_TARGETS, split_module
from ..ground.errors import KTAdapterError, name_some
from .model_names import ModuleNames


@dataclass(frozen=True)
class PeftPart:
    """An adapter's non-expert tensors, by the modules of one model."""

    modules: dict[str, list[str]]
    """module of the model -> its tensors in the file"""
    targets: list[str]
    """PEFT's target_modules: a bare name if every module of that name has LoRA, else exact module names"""
    filtered: list[str]
    """the adapter's own targets without :data:`MLP_TARGETS`, which PEFT never gets as bare names"""
    left_out: list[str]
    """tensors that the scope ``attention`` leaves out"""
    routers: dict[str, tuple[str, str]]
    """router that PEFT cannot wrap -> its A and B, which are added to the weight"""

    @property
    def tensors(self) -> list[str]:
        """All tensors that are applied."""
        return [name for part in (self.modules, self.routers) for names in part.values() for name in names]

    @property
    def exact(self) -> list[str]:
        """Targets that are exact module names."""
        return [target for target in self.targets if "." in target]


def check_peft_part(model: nn.Module, adapter: Adapter, scope: str = "all") -> PeftPart:
    """Find the model's module of every non-expert tensor, and check what headers tell.

    Args:
        model: empty or loaded, without PEFT's wrapper.
        scope: ``all`` or ``attention``, as ``kt_lora_scope``.

    Raises:
        KTAdapterError: Tensors belong to no module of the model (all are counted), a tensor does not have the size of the
            weight it changes, or a router has anything but one LoRA pair.
    """
    names = ModuleNames(model)
    modules: dict[str, list[str]] = {}
    routers: dict[str, list[str]] = {}
    left_over, left_out = [], []
    for tensor in adapter.other_names:
        module = names.find(split_module(tensor)[0])
        if module is None:
            left_over.append(tensor)
        elif scope == "attention" and _bare(module) in MLP_TARGETS:
            left_out.append(tensor)
        else:
            part = routers if _is_bare_router(submodule(model, module)) else modules
            part.setdefault(module, []).append(tensor)
    if left_over:
        raise KTAdapterError(
            f"{adapter.store.path}: {len(left_over)} of {len(adapter.store.infos)} tensors belong to no module of "
            f"{type(model).__name__}, first {name_some(left_over, 3)}. Nothing is dropped silently: is the adapter meant "
            "for this model?"
        )
    _check_shapes(model, adapter, modules)
    pairs = {module: _router_pair(model, adapter, module, tensors) for module, tensors in routers.items()}
    original = adapter.settings.target_modules
    targets = original if isinstance(original, list) else sorted({_bare(module) for module in modules})
    filtered = [target for target in targets if _bare(target) not in MLP_TARGETS]
    return PeftPart(modules, _targets(modules, names.known), filtered, left_out, pairs)


def _bare(module: str) -> str:
    return module.rpartition(".")[2]


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The model's own module of that name, without PEFT's wrappers."""
    module = model.get_submodule(name)
    while inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None):
        module = inner
    return module


def _targets(modules: Collection[str], known: set[str]) -> list[str]:
    """Bare names that select exactly the given modules, else the modules' full names."""
    targets = []
    for name in sorted(set(map(_bare, modules))):
        same = {module for module in known if _bare(module) == name}
        mine = {module for module in modules if _bare(module) == name}
        targets += [name] if same == mine and name not in MLP_TARGETS else sorted(mine)
    return targets


def _is_bare_router(module: nn.Module) -> bool:
    """Whether it is a top-k router of transformers 5, whose weight is a bare parameter [E, H] that PEFT 0.18 cannot wrap."""
    weight = getattr(module, "weight", None)
    return not isinstance(module, nn.Linear | nn.Embedding) and isinstance(weight, nn.Parameter) and weight.dim() == 2


def _router_pair(model: nn.Module, adapter: Adapter, module: str, tensors: list[str]) -> tuple[str, str]:
    """Names of A and B of one router; raises KTAdapterError if the tensors are not one LoRA pair of the router's size."""
    halves = {split_module(tensor)[1]: tensor for tensor in tensors}
    if set(halves) != {"lora_A.weight", "lora_B.weight"} or adapter.settings.use_dora:
        raise KTAdapterError(
            f"{adapter.store.path}: the router {module} has {name_some(tensors)}; only a LoRA pair without DoRA and bias can "
            "be applied to it."
        )
    weight: torch.Tensor = submodule(model, module).weight  # type: ignore[assignment]
    pair = halves["lora_A.weight"], halves["lora_B.weight"]
    a, b = (adapter.store.infos[name].shape for name in pair)
    if (b[0], a[1]) != tuple(weight.shape) or a[0] != b[1]:
        raise KTAdapterError(
            f"{adapter.store.path}: LoRA of {a} and {b} for the router {module}, whose weight is {tuple(weight.shape)}."
        )
    return pair


def _check_shapes(model: nn.Module, adapter: Adapter, modules: dict[str, list[str]]) -> None:
    """Compare LoRA of linear layers with the weights it changes: PEFT's own error would not name file, module and sizes."""
    for module, tensors in modules.items():
        layer = submodule(model, module)
        if not isinstance(layer, nn.Linear):
            continue
        for tensor in tensors:
            kind, shape = split_module(tensor)[1], adapter.store.infos[tensor].shape
            wanted = {"lora_A.weight": (1, layer.in_features), "lora_B.weight": (0, layer.out_features)}.get(kind)
            if wanted and (len(shape) != 2 or shape[wanted[0]] != wanted[1]):
                raise KTAdapterError(
                    f"{adapter.store.path}: {tensor} has shape {shape}, but {module} is a weight of "
                    f"{layer.out_features} x {layer.in_features}. The adapter was trained for another model"
                    f" ({adapter.settings.raw.get('base_model_name_or_path')})."
                )


def count_lora(model: nn.Module) -> int:
    """Parameters of PEFT's LoRA in the model."""
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def nbytes_by_device(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers per device type."""
    sizes: Counter[str] = Counter()
    for tensor in chain(model.parameters(), model.buffers()):
        sizes[tensor.device.type] += tensor.nbytes
    return dict(sizes)
