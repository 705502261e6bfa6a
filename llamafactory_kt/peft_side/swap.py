"""Exchanging what PEFT and the routers have of adapters, as a whole: if it fails, the model is as it was.

PEFT has no public way to take an adapter off and put it back unchanged: we move its layers, and read its classes for them.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.config import LoraSettings, match_pattern
from ..adapters.keys import PEFT_PREFIX, split_module
from ..ground.errors import KTAdapterError, name_some
from ..ground.internals import SWITCH, TESTED, Internal
from .given_names import names_as_given
from .split import PeftPart, submodule
from .untested import check_first_layer

INTERNAL = Internal("peft-layers", "peft", TESTED["peft"], essential=True)
_VARIANT = re.compile(r"^use_|_config$")
logger = logging.getLogger(__name__)

Parts = Sequence[tuple[Adapter, PeftPart]]


def exchange_peft_layers(model: Any, parts: Parts, routers: dict[str, torch.Tensor]) -> tuple[Any, Callable[[], None]]:
    """Replace the non-expert tensors of earlier adapters by those of these adapters.

    Only these tensors are read. Each adapter's ranks, alphas, patterns, rsLoRA, DoRA and modules_to_save stay in force;
    several adapters are active together and add up.

    Args:
        model: the plain model; PEFT changes it in place.
        routers: router -> its weight without LoRA, of all routers that adapters have changed so far; updated.

    Returns:
        The model in PEFT's wrapper (the model itself if PEFT has no part), and a function that restores the old state.

    Raises:
        KTAdapterError: PEFT cannot wrap a module, needs a tensor that the file does not have, or has no place for one of
            the file's. The model is as it was.
    """
    require_peft_layers(parts)
    undo = _remember(model, {*routers, *(router for _, part in parts for router in part.routers)})
    try:
        _detach(model)
        _set_routers(model, parts, routers)
        return _wrap(model, [(adapter, part) for adapter, part in parts if part.modules]), undo
    except BaseException:
        undo()
        raise


def require_peft_layers(parts: Sequence[tuple[Adapter, PeftPart]]) -> None:
    """Check that this PEFT can be given its parts of adapters; loads ask before they read weights.

    Raises:
        KTAdapterError: It is not installed, or switched off.
    """
    if any(part.modules for _, part in parts) and not INTERNAL.usable:
        raise KTAdapterError(
            f"LoRA outside the routed experts is applied by PEFT, which is not installed, or {SWITCH} switches it off."
        )


def merge_peft_layers(wrapped: Any) -> Any:
    """Let PEFT merge its LoRA into the weights for good. Returns the plain model."""
    if not hasattr(wrapped, "merge_and_unload"):  # PEFT has no part
        return wrapped
    plain = wrapped.merge_and_unload()
    vars(plain).pop("peft_config", None)
    return plain


def _wrap(model: Any, parts: Parts) -> Any:
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
    from peft.functional import cast_adapter_dtype
    from peft.utils import set_peft_model_state_dict

    wrapped, names = model, ["default", *(f"adapter_{number}" for number in range(2, len(parts) + 1))]
    for name, (adapter, part) in zip(names, parts, strict=False):
        config = _config(adapter, part)
        state = {
            f"{PEFT_PREFIX}{module}.{split_module(tensor)[1]}": adapter.read(tensor)
            for module, tensors in part.modules.items()
            for tensor in tensors
        }
        try:
            with names_as_given(model):
                if wrapped is model:
                    wrap = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
                    wrapped = wrap(model, config, adapter_name=name)
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


def peft_reads_weights(adapter: Adapter) -> bool:
    """Whether PEFT reads or copies weights of the model for this adapter; for plain LoRA it does not."""
    settings = adapter.settings.raw
    start = settings.get("init_lora_weights", True)
    return bool(settings.get("use_dora") or settings.get("modules_to_save") or start not in (True, False, "gaussian"))


def _config(adapter: Adapter, part: PeftPart) -> Any:
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    settings = adapter.settings
    # by PEFT's convention, what changes the computation is called so
    if newer := [key for key, value in settings.raw.items() if value and key not in fields and _VARIANT.search(key)]:
        raise KTAdapterError(
            f"{settings.path}: {name_some(newer)} is set, which the installed PEFT does not know. Install the version that saved the "
            f"adapter ({settings.raw.get('peft_version') or 'not recorded'})."
        )
    saved = adapter.settings.raw.get("modules_to_save") or []
    return LoraConfig(
        **{key: value for key, value in adapter.settings.raw.items() if key in fields}
        | {
            # Exact names replace every other way of choosing modules.
            "target_modules": [t for t in part.targets if t.rpartition(".")[2] not in saved] or None,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "target_parameters": None,
            **_patterns(settings, part),
            "inference_mode": True,
        }
    )


def _patterns(settings: LoraSettings, part: PeftPart) -> dict[str, dict[str, Any]]:
    """``rank_pattern`` and ``alpha_pattern``, which hold for names in the adapter, for the model's own."""
    found: dict[str, dict[str, Any]] = {}
    for key, pattern, default in (
        ("rank_pattern", settings.rank_pattern, settings.r), ("alpha_pattern", settings.alpha_pattern, settings.lora_alpha),
    ):  # fmt: skip
        values = {
            module: match_pattern(pattern, split_module(tensors[0])[0], default)
            for module, tensors in part.modules.items()
        }
        found[key] = {f"^{re.escape(module)}": value for module, value in values.items()} if pattern else {}
    return found


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> PEFT's outermost wrapper around one of the model's own modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: found[name] for name in found if not any(name.startswith(f"{outer}.") for outer in found)}


def _detach(model: Any) -> None:
    _put(model, {name: submodule(model, name) for name in _layers(model)})
    vars(model).pop("peft_config", None)


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)


def _remember(model: Any, routers: Iterable[str]) -> Callable[[], None]:
    layers, config = _layers(model), vars(model).get("peft_config")
    weights = {name: _weight(model, name).clone() for name in routers}

    @torch.no_grad()
    def undo() -> None:
        _detach(model)
        _put(model, layers)
        if config is not None:
            model.peft_config = config
        for name, weight in weights.items():
            _weight(model, name).copy_(weight)

    return undo


def _weight(model: nn.Module, router: str) -> torch.Tensor:
    return submodule(model, router).weight.data  # type: ignore[return-value, union-attr]


def _set_routers(model: Any, parts: Parts, pristine: dict[str, torch.Tensor]) -> None:
    """Set each router to its own weight plus the sum of the adapters' LoRA, rounded once to its dtype."""
    deltas: dict[str, torch.Tensor] = {}
    for adapter, part in parts:
        for name, pair in part.routers.items():
            a, b = (adapter.read(tensor).float() for tensor in pair)
            scaling = adapter.settings.scaling(split_module(pair[0])[0], a.shape[0])
            deltas[name] = deltas.get(name, 0) + scaling * (b @ a)
    for name in {*pristine, *deltas}:
        weight = _weight(model, name)
        own = pristine.setdefault(name, weight.clone())
        weight.copy_((own.float() + deltas[name].to(own.device)).to(own.dtype) if name in deltas else own)
    if deltas:
        logger.info(
            "Added the LoRA of %d routers to their weights (PEFT cannot wrap them), rounded to %s",
            len(deltas), str(weight.dtype).removeprefix("torch."),
        )  # fmt: skip
