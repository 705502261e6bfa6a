"""Which modules of a model are routed experts, and whether an engine can compute them.

transformers 5 gives every MoE model an experts module, called as ``experts(hidden_states [T, H], top_k_index [T, K],
top_k_weights [T, K]) -> [T, H]``, with fused weights ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I], marked by
``use_experts_implementation`` (``integrations/moe.py``). Architectures are accepted by this contract, never by name: we run
the class's own forward on tiny weights and compare it with ``down(silu(gate x) * up x)``. The marks and ``_default_apply_gate``
are transformers' own, not a public interface.
"""

from __future__ import annotations

import re
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters import ExpertsShape
from ..ground.errors import KTModelError
from ..ground.internals import SWITCH, Internal

INTERNAL = Internal("experts-contract", "transformers", ">=5.6,<5.9")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ExpertsModule:
    """One routed-experts module of a model."""

    name: str
    """module path, for example ``model.layers.3.mlp.experts``"""
    layer: int
    shape: ExpertsShape
    num_experts_per_tok: int


def find_experts(model: nn.Module) -> list[ExpertsModule]:
    """All routed-experts modules in order.

    Raises:
        KTModelError: The model has none, or one outside of the contract; the message gives the reason.
    """
    found = []
    for name, module in model.named_modules():
        if not _looks_like_experts(name, module):
            continue
        if reason := _refusal(module):
            raise KTModelError(
                f"{type(model).__name__}: the experts in {name} ({type(module).__name__}) cannot run in kt-kernel: {reason}. "
                "Remove use_kt to run this model with transformers alone."
            )
        layer = _LAYER.search(f".{name}.")
        if layer is None:
            raise KTModelError(f"{type(model).__name__}: {name} is not inside a numbered list of layers.")
        down: torch.Tensor = module.down_proj  # type: ignore[assignment]
        found.append(ExpertsModule(name, int(layer[1]), ExpertsShape(*down.shape), _top_k(model, name)))
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
    return found


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    marked = all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed"))
    return marked or (name.rpartition(".")[2] == "experts" and any(p.dim() == 3 for p in module.parameters(False)))


def _refusal(module: nn.Module) -> str | None:
    if not hasattr(module, "has_gate"):
        return "the class does not follow transformers' experts contract"
    for flag, wanted, reason in (
        ("has_gate", True, "they have no gate projection"),
        ("has_bias", False, "they have biases"),
        ("is_transposed", False, "their weights are stored transposed"),
    ):
        if getattr(module, flag) is not wanted:
            return reason
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter) or gate_up.dim() != 3:
        return "their weights are not named gate_up_proj and down_proj"
    experts, hidden, intermediate = down.shape
    if tuple(gate_up.shape) != (experts, 2 * intermediate, hidden):
        return f"gate_up_proj {tuple(gate_up.shape)} does not go with down_proj {tuple(down.shape)}"
    return _probe(module)


def _probe(module: nn.Module) -> str | None:
    """Run the class's own forward on tiny weights and compare it with the gated SiLU that the kernel computes."""
    if not INTERNAL.usable:
        return f"the contract is known for transformers {INTERNAL.versions} only, or {SWITCH} switches it off"
    from transformers.integrations.moe import _default_apply_gate

    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return "they have a gating function of their own"
    hidden, intermediate, experts, tokens = 8, 4, 3, 5
    generator = torch.Generator(device="cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        # Values of several units, so that clamps and other activations show.
        return 3 * torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

    gate_up, down = random(experts, 2 * intermediate, hidden), random(experts, hidden, intermediate)
    x, scores = random(tokens, hidden), random(tokens, 2).abs()
    index = (torch.arange(tokens, device="cpu")[:, None] + torch.arange(2, device="cpu")) % experts
    tiny = copy(module)
    tiny._parameters = {"gate_up_proj": nn.Parameter(gate_up, False), "down_proj": nn.Parameter(down, False)}
    tiny.num_experts = experts  # type: ignore[assignment]
    plain_forward: Any = getattr(type(module).forward, "__wrapped__", type(module).forward)
    try:
        with torch.no_grad():
            found = plain_forward(tiny, x, index, scores)
    except Exception as error:  # anything: the forward may need what the contract does not promise
        return f"their forward needs more than the contract gives ({type(error).__name__}: {error})"
    gate, up = (gate_up[index] @ x[:, None, :, None]).chunk(2, dim=2)
    wanted = (scores[..., None] * (down[index] @ (F.silu(gate) * up))[..., 0]).sum(1)
    if not torch.allclose(found.float(), wanted, rtol=1e-3, atol=1e-3):
        return "they do not compute down(silu(gate x) * up x)"
    return None


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _top_k(model: nn.Module, name: str) -> int:
    """Experts per token: from the MoE block or its router, else from the configuration."""
    block = model.get_submodule(name.rpartition(".")[0])
    candidates = [
        *(getattr(module, "top_k", None) for module in (block, *block.children())),
        getattr(_text_config(model), "num_experts_per_tok", None),
    ]
    for value in candidates:
        if isinstance(value, int) and value > 0:
            return value
    raise KTModelError(f"{type(model).__name__}: cannot tell how many experts per token {name} uses.")
