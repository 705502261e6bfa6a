"""Exchanging the dense part of adapters as a whole: if it fails, the model is as it was.

PEFT gets plain LoRA alone, by the model's own names and with each module's own rank and alpha. All else, routers and whatever an adapter
saves as a whole, changes the model's weights, of which the own ones are kept.

PEFT has no public way to take an adapter off and put it back unchanged: we move its layers, and read its classes for them.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.keys import PEFT_PREFIX
from ..ground.errors import KTAdapterError, name_some
from ..ground.internals import SWITCH, TESTED, Internal
from .changes import AddLora, Change
from .given_names import names_as_given
from .part import ModuleLora, PeftPart
from .split import submodule, weight_of
from .untested import check_first_layer

INTERNAL = Internal("peft-layers", "peft", TESTED["peft"], essential=True)
logger = logging.getLogger(__name__)

Parts = Sequence[tuple[Adapter, PeftPart]]
Weights = dict[str, torch.Tensor]
"""a model's own parameters and buffers, of those that adapters have changed"""


def exchange_peft_layers(model: Any, parts: Parts, own: Weights) -> tuple[Any, Callable[[], None]]:
    """Replace the non-expert tensors of earlier adapters by those of these adapters.

    Only these tensors are read. Several adapters are active together and add up.

    Args:
        model: the plain model; it is changed in place.
        own: the weights that earlier adapters have changed, as they were before; updated.

    Returns:
        The model in PEFT's wrapper (the model itself if PEFT has no part), and a call that puts the old state back, whatever is in place
        then, as often as it is wanted.

    Raises:
        KTAdapterError: PEFT cannot wrap a module, needs a tensor that the file does not have, or has no place for one of
            the file's. The model is as it was.
    """
    require_peft_layers(parts)
    undo = _remember(model, own)
    try:
        _detach(model)
        _restore(model, own)
        _change(model, [(adapter, part.changes) for adapter, part in parts], own)
        _log_routers(parts, own)
        return _wrap(model, [(adapter, part) for adapter, part in parts if part.lora]), undo
    except BaseException:
        undo()
        raise


def require_peft_layers(parts: Parts) -> None:
    """Check that this PEFT can be given its parts of adapters; loads ask before they read weights.

    Raises:
        KTAdapterError: It is not installed, or switched off.
    """
    if any(part.lora for _, part in parts) and not INTERNAL.usable:
        raise KTAdapterError(
            f"LoRA outside the routed experts is applied by PEFT, which is not installed, or {SWITCH} switches it off."
        )


def merge_dense_part(model: Any, parts: Parts) -> None:
    """Change the weights of a plain model for good, LoRA included.

    Raises:
        KTAdapterError: A part cannot be merged. Nothing has been changed.
    """
    merged = [(adapter, part.merged(adapter)) for adapter, part in parts]
    for adapter, changes in merged:
        if absent := [name for name in changes if weight_of(model, name) is None]:
            raise KTAdapterError(
                f"{adapter.store.path}: {name_some(absent, 3)}: the model has no such weight to merge into."
            )
    _change(model, merged, {})


@torch.no_grad()
def _change(model: Any, parts: Sequence[tuple[Adapter, Mapping[str, Sequence[Change]]]], own: Weights) -> None:
    for name in dict.fromkeys(name for _, changes in parts for name in changes):
        weight = weight_of(model, name)
        changed = weight.detach()
        for adapter, changes in parts:
            for change in changes.get(name, ()):
                changed = change.apply(adapter, changed)
        changed = changed.to(weight.dtype)
        own[name] = weight
        _set(model, name, nn.Parameter(changed, requires_grad=False) if isinstance(weight, nn.Parameter) else changed)


def _log_routers(parts: Parts, own: Weights) -> None:
    added = {name for _, part in parts for name, changes in part.changes.items() if isinstance(changes[-1], AddLora)}
    if added:
        logger.info(
            "Added the LoRA of %d routers to their weights (PEFT cannot wrap them), rounded to %s",
            len(added), str(own[added.pop()].dtype).removeprefix("torch."),
        )  # fmt: skip


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(submodule(model, module), leaf, value)


def _restore(model: nn.Module, own: Weights) -> None:
    for name, weight in own.items():
        _set(model, name, weight)
    own.clear()


def _wrap(model: Any, parts: Parts) -> Any:
    from peft import PeftModelForCausalLM
    from peft.functional import cast_adapter_dtype
    from peft.utils import set_peft_model_state_dict

    wrapped, names = model, ["default", *(f"adapter_{number}" for number in range(2, len(parts) + 1))]
    for name, (adapter, part) in zip(names, parts, strict=False):
        config = _config(adapter, part)
        state = {
            f"{PEFT_PREFIX}{module}.{rest}": adapter.read(tensor)
            for module, lora in part.lora.items()
            for rest, tensor in lora.tensors.items()
        }
        try:
            with names_as_given(model):
                if wrapped is model:
                    wrapped = PeftModelForCausalLM(model, config, adapter_name=name)
                else:
                    wrapped.add_adapter(name, config)
                    cast_adapter_dtype(wrapped, name)  # to float32, as PEFT does for the first
                result = set_peft_model_state_dict(wrapped, state, adapter_name=name)
        except (ValueError, RuntimeError, KeyError) as error:
            raise KTAdapterError(f"{adapter.store.path}: PEFT cannot apply the non-expert part: {error}") from error
        missing = [key for key in result.missing_keys if ".lora_" in key and f".{name}." in f"{key}."]
        if missing or result.unexpected_keys:
            raise KTAdapterError(
                f"{adapter.store.path}: PEFT found no tensor for {name_some(missing, 3) or 'nothing'} and no place for "
                f"{name_some(result.unexpected_keys, 3) or 'nothing'}."
            )
    if len(parts) > 1:
        wrapped.base_model.set_adapter(names, inference_mode=True)
    if parts and not INTERNAL.tested:
        check_first_layer(model, parts)
    return wrapped.eval()


def _config(adapter: Adapter, part: PeftPart) -> Any:
    """PEFT's configuration of these modules alone, by exact names: the adapter's own patterns are about the names of its time."""
    from peft import LoraConfig

    settings = adapter.settings
    ranks, rank = _patterns(part.lora, {m: settings.expected_rank(lora.trained) for m, lora in part.lora.items()})
    alphas, alpha = _patterns(part.lora, {m: settings.alpha(lora.trained) for m, lora in part.lora.items()})
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        lora_bias=settings.lora_bias,
        target_modules=part.targets,
        init_lora_weights=True,  # of what is overwritten
        inference_mode=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=settings.base_model,
    )


def _patterns(modules: Mapping[str, ModuleLora], values: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Exact name -> value, of the modules whose value is not the most frequent one; and that one."""
    common = Counter(values.values()).most_common(1)[0][0]
    return {f"^{re.escape(module)}": values[module] for module in modules if values[module] != common}, common


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> PEFT's outermost wrapper around one of the model's own modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name: found[name] for name in found if not any(name.startswith(f"{outer}.") for outer in found)}


def _detach(model: Any) -> None:
    _put(model, {name: submodule(model, name) for name in _layers(model)})
    vars(model).pop("peft_config", None)


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)


def _remember(model: Any, own: Weights) -> Callable[[], None]:
    layers, config, before = _layers(model), vars(model).get("peft_config"), dict(own)
    changed = {name: weight_of(model, name) for name in own}

    def undo() -> None:
        _detach(model)
        _restore(model, own)
        for name, weight in changed.items():
            _set(model, name, weight)
        own.update(before)
        _put(model, layers)
        if config is not None:
            model.peft_config = config

    return undo
