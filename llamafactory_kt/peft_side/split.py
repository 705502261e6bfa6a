"""The dense part of an adapter, everything except routed experts: by a model's own names, LoRA for PEFT and other weights for us."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.keys import MLP_TARGETS, split_module
from ..ground.errors import KTAdapterError, name_some
from .model_names import ModuleNames, tied_weights
from .part import ModuleLora, PeftPart
from .whole_weights import ROWS, WholeWeights


def check_peft_part(model: nn.Module, adapter: Adapter, scope: str = "all", *, resizes: bool = False) -> PeftPart:
    """Find the model's module of every non-expert tensor, and check what headers tell.

    Args:
        model: empty or loaded, without PEFT's wrapper.
        scope: ``all`` or ``attention``, as ``kt_lora_scope``.
        resizes: the embeddings and the output layer are yet to be resized, so theirs are not compared.

    Raises:
        KTAdapterError: Tensors belong to no module of the model (all are counted), or a tensor does not have the size of the
            weight it changes.
    """
    names = ModuleNames(model)
    lora: dict[str, ModuleLora] = {}
    weights = WholeWeights(adapter)
    left_over, left_out = [], []
    for tensor in adapter.other_names:
        trained, part = split_module(tensor)
        module = names.find(trained)
        is_lora = part.startswith("lora_")
        leaf = "weight" if is_lora or part == ROWS else part
        if module is None or not isinstance(getattr(submodule(model, module), leaf, None), torch.Tensor):
            left_over.append(tensor)
        elif scope == "attention" and _bare(module) in MLP_TARGETS:
            left_out.append(tensor)
        elif is_lora:
            same = lora.setdefault(module, ModuleLora(trained, {})).tensors.setdefault(part, tensor)
            if same != tensor:
                raise KTAdapterError(f"{adapter.store.path}: {same} and {tensor} are the same weight.")
        else:
            weights.add(f"{module}.{leaf}", tensor)
    if left_over:
        raise KTAdapterError(
            f"{adapter.store.path}: {len(left_over)} of {len(adapter.store.infos)} tensors belong to no module of "
            f"{type(model).__name__}, first {name_some(left_over, 3)}. Nothing is dropped silently: is the adapter meant "
            "for this model?"
        )
    changes = weights.changes(tied_weights(model), input_embeddings(model))
    for module in [module for module in lora if _is_bare_router(submodule(model, module))]:
        changes.setdefault(f"{module}.weight", []).extend(lora.pop(module).changes(adapter, module).values())
    found = PeftPart(lora, changes, _targets(lora, names.known), _filtered(adapter, lora), left_out)
    _check_shapes(model, adapter, found, resizes)
    return found


def _filtered(adapter: Adapter, lora: Collection[str]) -> list[str]:
    original = adapter.settings.target_modules
    targets = original if isinstance(original, list) else sorted({_bare(module) for module in lora})
    return [target for target in targets if _bare(target) not in MLP_TARGETS]


def _bare(module: str) -> str:
    return module.rpartition(".")[2]


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The model's own module of that name, without PEFT's wrappers."""
    module = model.get_submodule(name)
    while inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None):
        module = inner
    return module


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    """The model's own parameter or buffer of that name."""
    module, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(submodule(model, module), leaf)
    return found


def _targets(modules: Collection[str], known: set[str]) -> list[str]:
    """Bare names that select exactly the given modules, else the modules' full names."""
    targets = []
    for name in sorted(set(map(_bare, modules))):
        same = {module for module in known if _bare(module) == name}
        mine = {module for module in modules if _bare(module) == name}
        targets += [name] if same == mine and name not in MLP_TARGETS else sorted(mine)
    return targets


def _is_bare_router(module: nn.Module) -> bool:
    """Whether it is a top-k router of transformers 5, whose weight is a bare parameter [E, H] that PEFT cannot wrap."""
    weight = getattr(module, "weight", None)
    return not isinstance(module, nn.Linear | nn.Embedding) and isinstance(weight, nn.Parameter) and weight.dim() == 2


def _check_shapes(model: nn.Module, adapter: Adapter, part: PeftPart, resizes: bool) -> None:
    """Compare tensors with the weights that they change: PEFT's own error would not name file, module and sizes."""
    changes = [(name, change) for name, all_of_it in part.changes.items() for change in all_of_it]
    for module, lora in part.lora.items():
        changes += [(f"{module}.weight", lora.sum(adapter))]
    vocabulary = vocabulary_weights(model)
    for name, change in changes:
        wrong = change.problem(adapter, _shape(model, name))
        if wrong and not (resizes and name in vocabulary):
            advice = (
                " If it was trained with more tokens, set resize_vocab, add_tokens or new_special_tokens as then."
                if name in vocabulary
                else ""
            )
            raise KTAdapterError(f"{adapter.store.path}: {name}: {wrong}{advice}{adapter.trained_for}")


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """Of one of the model's weights; a linear layer's may be packed in another."""
    module, _, leaf = name.rpartition(".")
    layer = submodule(model, module)
    if isinstance(layer, nn.Linear) and leaf == "weight":
        return layer.out_features, layer.in_features
    return tuple(weight_of(model, name).shape)


def input_embeddings(model: Any) -> str:
    """The name of the input embeddings' weight."""
    module = model.get_input_embeddings()
    return next(f"{name}.weight" for name, found in model.named_modules() if found is module)


def vocabulary_weights(model: Any) -> dict[str, nn.Module]:
    """The weights with a row for each token: name -> embeddings or output layer."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {f"{name}.weight": module for name, module in model.named_modules() if any(module is one for one in modules)}
