"""The dense part of an adapter, everything except routed experts: by a model's own names, LoRA for PEFT and other weights for us."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.keys import MLP_TARGETS, split_module
from ..ground.errors import KTAdapterError, name_some
from .changes import Change, Replace, ReplaceRows
from .model_names import ModuleNames, tied_weights
from .part import ModuleLora, PeftPart

_ROWS = "trainable_tokens_delta"


def check_peft_part(model: nn.Module, adapter: Adapter, scope: str = "all") -> PeftPart:
    """Find the model's module of every non-expert tensor, and check what headers tell.

    Args:
        model: empty or loaded, without PEFT's wrapper.
        scope: ``all`` or ``attention``, as ``kt_lora_scope``.

    Raises:
        KTAdapterError: Tensors belong to no module of the model (all are counted), or a tensor does not have the size of the
            weight it changes.
    """
    names = ModuleNames(model)
    lora: dict[str, ModuleLora] = {}
    weights: dict[str, tuple[str, str]] = {}  # parameter -> (its tensor, the module's name when it was trained)
    left_over, left_out = [], []
    for tensor in adapter.other_names:
        trained, part = split_module(tensor)
        module = names.find(trained)
        is_lora = part.startswith("lora_")
        leaf = "weight" if is_lora or part == _ROWS else part
        if module is None or not isinstance(getattr(submodule(model, module), leaf, None), torch.Tensor):
            left_over.append(tensor)
        elif scope == "attention" and _bare(module) in MLP_TARGETS:
            left_out.append(tensor)
        elif is_lora:
            lora.setdefault(module, ModuleLora(trained, {})).tensors[part] = tensor
        else:
            weights[f"{module}.{leaf}"] = tensor, trained
    if left_over:
        raise KTAdapterError(
            f"{adapter.store.path}: {len(left_over)} of {len(adapter.store.infos)} tensors belong to no module of "
            f"{type(model).__name__}, first {name_some(left_over, 3)}. Nothing is dropped silently: is the adapter meant "
            "for this model?"
        )
    _check_saved(
        adapter, {split_module(tensor)[0] for tensor in (*left_out, *(tensor for tensor, _ in weights.values()))}
    )
    changes = _weight_changes(adapter, weights, tied_weights(model))
    for module in [module for module in lora if _is_bare_router(submodule(model, module))]:
        changes.setdefault(f"{module}.weight", []).extend(lora.pop(module).changes(adapter, module).values())
    found = PeftPart(lora, changes, _targets(lora, names.known), _filtered(adapter, lora), left_out)
    _check_shapes(model, adapter, found)
    return found


def _check_saved(adapter: Adapter, found: Collection[str]) -> None:
    """Find what the configuration says was trained as a whole among the modules (by their names then) that the file has weights of."""
    settings = adapter.settings
    rows = settings.trainable_token_indices
    wanted = [*settings.modules_to_save, *(rows if isinstance(rows, dict) else ())]
    if absent := [
        name
        for name in wanted
        if not any(f"{module}.".endswith(f"{name}.") or f"{name}." in module for module in found)
    ]:
        raise KTAdapterError(
            f"{settings.path} says that {name_some(absent)} was trained as a whole, and {adapter.store.path.name} has no tensor of it; the "
            "file is incomplete."
        )


def _weight_changes(
    adapter: Adapter, weights: Mapping[str, tuple[str, str]], ties: Mapping[str, set[str]]
) -> dict[str, list[Change]]:
    """The changes by whole weights and rows. Of weights that are one by the model's configuration, all change, as in PEFT, unless the
    file has its own tensor for one, or the weight is among ``modules_to_save``, which are copies."""
    changes: dict[str, list[Change]] = {}
    for weight, (tensor, trained) in weights.items():
        rows = tensor.endswith(_ROWS)
        own = not rows and (adapter.settings.saves(trained) or ".modules_to_save." in tensor)
        change = ReplaceRows((tensor,), _rows(adapter, trained)) if rows else Replace((tensor,))
        for name in {weight} if own else {weight, *(ties.get(weight, set()) - weights.keys())}:
            changes[name] = [change]
    return changes


def _rows(adapter: Adapter, module: str) -> tuple[int, ...]:
    indices = adapter.settings.trainable_token_indices
    if isinstance(indices, dict):  # by the ends of modules' names
        indices = next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), [])
    return tuple(indices)


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


def _check_shapes(model: nn.Module, adapter: Adapter, part: PeftPart) -> None:
    """Compare tensors with the weights that they change: PEFT's own error would not name file, module and sizes."""
    changes = [(name, change) for name, all_of_it in part.changes.items() for change in all_of_it]
    for module, lora in part.lora.items():
        changes += [(f"{module}.weight", lora.sum(adapter))]
    for name, change in changes:
        if wrong := change.problem(adapter, tuple(weight_of(model, name).shape)):
            raise KTAdapterError(f"{adapter.store.path}: {name}: {wrong}{adapter.trained_for}")
