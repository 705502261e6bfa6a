"""Which modules of a model are routed experts, and whether an engine can compute them.

transformers 5 gives every MoE model an experts module, called as ``experts(hidden_states [T, H], top_k_index [T, K],
top_k_weights [T, K]) -> [T, H]``, with fused weights ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I], marked by
``use_experts_implementation`` (``integrations/moe.py``). Architectures are accepted by this contract, never by name: what a class
computes is learnt from its own forward (:mod:`.contract`). The marks are transformers' own, not a public interface.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters import ExpertsShape
from ..ground.errors import KTModelError
from ..ground.internals import SWITCH, TESTED, Internal
from .contract import OutsideContract, read_contract
from .formula import PLAIN, ExpertFormula

INTERNAL = Internal("experts-contract", "transformers", TESTED["transformers"], essential=True)
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ExpertsModule:
    """One routed-experts module of a model."""

    name: str
    """module path, for example ``model.layers.3.mlp.experts``"""
    layer: int
    shape: ExpertsShape
    num_experts_per_tok: int
    formula: ExpertFormula = PLAIN
    presorted: bool = False
    """called with each expert's rows, multiplied with the routers' weights before (Llama-4)"""

    @property
    def weights(self) -> tuple[str, str]:
        """The module's fused weights."""
        return ("gate_up_proj" if self.formula.has_gate else "up_proj"), "down_proj"

    @property
    def biases(self) -> tuple[str, ...]:
        """The module's biases."""
        return tuple(f"{weight}_bias" for weight in self.weights) if self.formula.has_biases else ()


def formulas(modules: Iterable[ExpertsModule]) -> list[ExpertFormula]:
    """What their experts compute; each formula once."""
    return list(dict.fromkeys(module.formula for module in modules))


def find_experts(model: nn.Module) -> list[ExpertsModule]:
    """All routed-experts modules in order.

    Raises:
        KTModelError: The model has none, or one outside of the contract; the message gives the reason.
    """
    found = []
    for name, module in model.named_modules():
        if not _looks_like_experts(name, module) or not of_language(model, name):
            continue
        if not INTERNAL.usable:
            raise KTModelError(
                f"{type(model).__name__}: {SWITCH} switches off the look at the class's marks; unset that."
            )
        try:
            contract = read_contract(module)
        except OutsideContract as reason:
            raise KTModelError(
                f"{type(model).__name__}: the experts in {name} ({type(module).__name__}) cannot be computed by any engine: {reason}. "
                "Remove use_kt to run this model with transformers alone."
            ) from None
        layer = _LAYER.search(f".{name}.")
        if layer is None:
            raise KTModelError(f"{type(model).__name__}: {name} is not inside a numbered list of layers.")
        top_k, experts = _top_k(model, name), contract.shape.num_experts
        if top_k > experts:
            raise KTModelError(
                f"{type(model).__name__}: config.json asks for {top_k} experts per token, and {name} has {experts}. Correct one of the "
                "two numbers in config.json, which is not that of these weights."
            )
        top_k = 1 if contract.presorted else top_k
        found.append(ExpertsModule(name, int(layer[1]), contract.shape, top_k, contract.formula, contract.presorted))
    if not found:
        counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        if any((getattr(_text_config(model), name, 0) or 0) > 1 for name in counts):
            raise KTModelError(
                f"{type(model).__name__} is a mixture of experts, but its experts are not a module of transformers' experts "
                "contract. Remove use_kt to run it with transformers alone."
            )
        raise KTModelError(
            f"{type(model).__name__} has no routed experts (it is not a mixture-of-experts model, or this transformers "
            "has no native class for it). Remove use_kt to run it with transformers alone."
        )
    if len(found) > len(layers := {module.layer: module.name for module in found}):
        first = next(module for module in found if layers[module.layer] != module.name)
        raise KTModelError(
            f"{type(model).__name__} has several groups of experts in layer {first.layer}, {first.name} and {layers[first.layer]}, which "
            "adapters and statistics could not tell apart. Remove use_kt to run it with transformers alone."
        )
    return found


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    marked = all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed"))
    return marked or (name.rpartition(".")[2] == "experts" and any(p.dim() == 3 for p in module.parameters(False)))


def of_language(model: nn.Module, name: str) -> bool:
    """Whether a module belongs to the language model. A vision tower may have experts too (dots.note), which stay transformers' own."""
    from transformers import PreTrainedModel

    path = name.split(".")
    around = (model.get_submodule(".".join(path[:length])) for length in range(len(path), 0, -1))
    owner = next((module for module in around if isinstance(module, PreTrainedModel)), model)
    return owner is model or type(owner.config) is type(_text_config(model))


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _top_k(model: nn.Module, name: str) -> int:
    """Experts per token: from the MoE block or its router, else from the configuration."""
    block = model.get_submodule(name.rpartition(".")[0])
    candidates = [
        *(getattr(module, "top_k", None) for module in (block, *block.children())),
        *(getattr(_text_config(model), key, None) for key in ("num_experts_per_tok", "top_k_experts", "moe_topk")),
    ]
    for value in candidates:
        if isinstance(value, int) and value > 0:
            return value
    raise KTModelError(f"{type(model).__name__}: cannot tell how many experts per token {name} uses.")
