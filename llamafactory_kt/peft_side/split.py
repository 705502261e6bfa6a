"""The part of an adapter that PEFT applies: everything except routed experts, through exact module names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.keys import split_module
from ..ground.errors import KTAdapterError, name_some

MOE_TARGETS = ("gate_proj", "up_proj", "down_proj")
"""Bare names that mean experts as well as shared experts and dense layers, so PEFT never gets them bare."""


@dataclass(frozen=True)
class PeftPart:
    """The split of an adapter's non-expert tensors for one model."""

    modules: dict[str, list[str]]
    """module of the model -> its tensors in the file"""
    targets: list[str]
    """what becomes PEFT's target_modules: bare names where every such module has LoRA, else exact module names"""
    filtered: list[str]
    """the adapter's own targets without those that PEFT never gets bare"""
    left_out: list[str]
    """tensors the scope ``attention`` leaves out"""
    routers: dict[str, list[str]]
    """routers PEFT cannot wrap -> their A and B, which are added to the weight"""

    @property
    def tensors(self) -> list[str]:
        return [name for part in (self.modules, self.routers) for names in part.values() for name in names]

    @property
    def exact(self) -> list[str]:
        """Modules added by exact name."""
        return [target for target in self.targets if "." in target]


def plan_peft_part(model: nn.Module, adapter: Adapter, scope: str) -> PeftPart:
    """Find the model's module of every non-expert tensor.

    Raises:
        KTAdapterError: Tensors are left over: no module of the model goes by their name. All are counted.
    """
    known = {name for name, _ in model.named_modules()}
    renamed = _renamings(model)
    modules: dict[str, list[str]] = {}
    routers: dict[str, list[str]] = {}
    left_over, left_out = [], []
    for tensor in adapter.other_names:
        module = _find(split_module(tensor)[0], known, renamed)
        if module is None:
            left_over.append(tensor)
        elif scope == "attention" and module.rpartition(".")[2] in MOE_TARGETS:
            left_out.append(tensor)
        elif _is_bare_router(submodule(model, module)):
            routers.setdefault(module, []).append(tensor)
        else:
            modules.setdefault(module, []).append(tensor)
    if left_over:
        raise KTAdapterError(
            f"{adapter.store.path}: {len(left_over)} of {len(adapter.store.infos)} tensors belong to no module of "
            f"{type(model).__name__}, first {name_some(left_over, 3)}. Nothing is dropped silently: is the adapter meant "
            "for this model?"
        )
    original = adapter.settings.target_modules
    bare = original if isinstance(original, list) else sorted({module.rpartition(".")[2] for module in modules})
    filtered = [target for target in bare if target.rpartition(".")[2] not in MOE_TARGETS]
    return PeftPart(modules, _targets(modules, known), filtered, left_out, routers)


def check_peft_part(model: nn.Module, adapter: Adapter, scope: str = "all") -> PeftPart:
    """:func:`plan_peft_part` with every check that headers allow, also on a model that is still empty.

    Raises:
        KTAdapterError: As :func:`plan_peft_part`, or a tensor has not the size of the weight it changes.
    """
    part = plan_peft_part(model, adapter, scope)
    _check_shapes(model, adapter, part.modules)
    for module, tensors in part.routers.items():
        _router_pair(model, adapter, module, tensors)
    return part


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The model's own module of that name, without what PEFT has wrapped around it."""
    module = model.get_submodule(name)
    while inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None):
        module = inner
    return module


def _renamings(model: Any) -> list[Any]:
    """transformers' own renamings of old checkpoint names (for example Mixtral's ``block_sparse_moe``)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [rule for rule in get_model_conversion_mapping(model, add_legacy=False) if isinstance(rule, WeightRenaming)]


def _find(module: str, known: set[str], renamings: Iterable[Any]) -> str | None:
    if module in known:
        return module
    renamed = f"{module}.weight"
    for rule in renamings:
        renamed, _ = rule.rename_source_key(renamed)
    renamed = renamed.removesuffix(".weight")
    for candidate in (renamed, f"model.{renamed}", renamed.removeprefix("model.")):
        if candidate in known:
            return candidate
    return None


def _targets(modules: Iterable[str], known: set[str]) -> list[str]:
    """Bare names where they select exactly the modules in the file, else the modules' full names."""
    chosen = set(modules)
    targets = []
    for name in sorted({module.rpartition(".")[2] for module in chosen}):
        same = {module for module in known if module.rpartition(".")[2] == name}
        mine = {module for module in chosen if module.rpartition(".")[2] == name}
        targets += [name] if same == mine and name not in MOE_TARGETS else sorted(mine)
    return targets


def _is_bare_router(module: nn.Module) -> bool:
    """transformers 5's top-k routers hold their weight as a bare parameter [E, H], which PEFT 0.18 cannot wrap."""
    weight = getattr(module, "weight", None)
    return not isinstance(module, nn.Linear | nn.Embedding) and isinstance(weight, nn.Parameter) and weight.dim() == 2


def _router_pair(model: nn.Module, adapter: Adapter, module: str, tensors: list[str]) -> tuple[str, str]:
    """A and B of one router.

    Raises:
        KTAdapterError: It is not one LoRA pair of the router's size.
    """
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


def router_delta(model: nn.Module, adapter: Adapter, module: str, tensors: list[str]) -> torch.Tensor:
    """``scaling * B @ A`` of one router, float32 [E, H].

    Raises:
        KTAdapterError: It is not one LoRA pair of the router's size.
    """
    a, b = (adapter.read(name).float() for name in _router_pair(model, adapter, module, tensors))
    return adapter.settings.scaling(module, a.shape[0]) * (b @ a)


def _check_shapes(model: nn.Module, adapter: Adapter, modules: dict[str, list[str]]) -> None:
    """Compare LoRA of linear layers with the weight it changes, so that the error names file, module and sizes."""
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


def count_lora(model: nn.Module) -> tuple[int, int]:
    """(tensors, parameters) of LoRA that PEFT holds in the model."""
    lora = [p for n, p in model.named_parameters() if "lora_" in n]
    return len(lora), sum(p.numel() for p in lora)


def non_expert_nbytes(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers per device type."""
    sizes: dict[str, int] = {}
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        sizes[tensor.device.type] = sizes.get(tensor.device.type, 0) + tensor.nbytes
    return sizes
