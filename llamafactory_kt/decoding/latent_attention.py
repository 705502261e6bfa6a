"""Multi-head latent attention (DeepSeek-V2) whose cache keeps what keys and values are made of.

A token's keys and values of all heads are a product of one latent vector c with ``kv_b_proj``, beside a rotated part that all heads share.
Stock transformers 5.6 keeps the products; here the cache keeps ``[c, rotated]``, as one key head. For few queries the product moves to the
other side of the sums over keys (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.2)::

    q . (W_uk c) = (W_uk^T q) . c          sum_k p_k (W_uv c_k) = W_uv (sum_k p_k c_k)

so that all heads attend to the one key head, whose values are the first part of its keys. For many queries that would be more work: keys and
values are made for the time of a layer's call, some heads at a time.

A module is recognized by its parts and by what it computes, not by its class: its own forward, on small random weights, has to give what the
one here does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ground.internals import TESTED, Internal
from ..model.growing_cache import GrowingLayer
from ..native.fused_linear import Factors, FusedLinear, Unchanged, fits
from ..native.head_products import HeadProducts
from ..native.library import library
from ..native.quantized_tensor import QuantizedTensor
from . import attention
from .latent_contract import LatentContract, has_query, read_contract, rotated
from .lora_linear import InferenceLora
from .quantized_cache import Int8Layer

INTERNAL = Internal("latent-attention", "transformers", TESTED["transformers"])
_BYTES = 64 * 2**20
"""of keys and values that are made at once"""


class LatentAttention(nn.Module):
    """Stands in as the class of an attention module, together with the module's own, which computes whatever has another cache."""

    caches_latents = True
    _kt_contract: LatentContract
    config: Any
    layer_idx: int
    scaling: float
    q_proj: Any
    q_a_proj: Any
    q_a_layernorm: Any
    q_b_proj: Any
    kv_a_proj_with_mqa: Any
    kv_a_layernorm: Any
    kv_b_proj: Any
    o_proj: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module's own: hidden states [B, T, H] -> ([B, T, H], the softmax's weights or None)."""
        if torch.compiler.is_compiling():  # a graph's cache is one that has not grown here: a static one, or none
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        contract = self._kt_contract
        given = dict(zip(contract.arguments, args, strict=False)) | kwargs
        cache = given.pop(contract.cache, None)
        if not self._keeps_latents(hidden_states, cache):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        mask, positions = given.pop("attention_mask", None), given.pop("position_embeddings", None)
        queries, latents = self._projected(hidden_states, positions)
        latents, _ = cache.update(latents, latents[..., :0], self.layer_idx)
        found, weights = self._attend(queries, latents, mask, given)
        return self.o_proj(found.flatten(2)), weights

    def _keeps_latents(self, x: torch.Tensor, cache: Any) -> bool:
        """Whether the cache has latents for this layer, or nothing yet and can get them."""
        if not isinstance(cache, Cache) or x.device.type != "cpu":
            return False
        number = self.layer_idx
        layer = cache.layers[number] if number < len(cache.layers) else None
        if layer is not None and layer.is_initialized and layer.keys.numel():
            size = self._kt_contract.latent + self._kt_contract.rotated
            return bool(layer.keys.shape[1] == 1 and layer.keys.shape[-1] == size and not layer.values.shape[-1])
        kind = type(layer) if layer is not None else cache.layer_class_to_replicate
        plain = kind in (DynamicLayer, GrowingLayer, Int8Layer) and not getattr(cache, "offloading", False)
        return plain and not torch.is_grad_enabled() and self._up_projection(x) is not None

    def _projected(self, x: torch.Tensor, positions: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, heads, T, plain + rotated], and what the cache keeps, [B, 1, T, latent + rotated]."""
        of = self._kt_contract
        q = self.q_proj(x) if has_query(self) else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (of.heads, -1)).transpose(1, 2)
        low = self.kv_a_proj_with_mqa(x)
        latent, shared = self.kv_a_layernorm(low[..., : of.latent]), low[:, None, :, of.latent :]
        turned, shared = rotated(of.rotary, q[..., of.plain :], shared, positions)
        return torch.cat((q[..., : of.plain], turned), -1), torch.cat((latent[:, None], shared), -1)

    def _attend(
        self, q: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None, given: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, heads, values]."""
        of, settings = self._kt_contract, {"dropout": 0.0, "scaling": self.scaling, **given}
        up = self._up_projection(q)
        if up is not None and of.absorbs(q.shape[2], latents.shape[2]) and self.config._attn_implementation == "sdpa":  # type: ignore[union-attr]
            values = latents[..., : of.latent]
            view = attention.view(self, q, latents, values, mask, settings)
            if view is not None:
                absorbed = up.keys(q[..., : of.plain].transpose(1, 2))
                wide = torch.cat((absorbed.transpose(1, 2), q[..., of.plain :]), -1)
                found = attention.attend(wide, latents, values, view, settings)
                return up.values(found), None
        return self._expanded(q, latents, mask, settings, up)

    def _expanded(
        self, q: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None, settings: dict[str, Any], up: _UpProjection | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """As the module's own forward does it, with the cache's latents; some heads at a time."""
        of = self._kt_contract
        eager = vars(sys.modules[type(self).__module__]).get("eager_attention_forward")
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)  # type: ignore[union-attr]
        both, outs, weights = of.plain + of.values, [], []
        step = of.heads
        if up is not None and (mask is None or mask.shape[1] == 1):
            of_head = latents.shape[0] * latents.shape[2] * (2 * both + of.rotated) * latents.itemsize
            step = max(1, min(of.heads, _BYTES // of_head))
        for first in range(0, of.heads, step):
            some = slice(first, first + step)
            flat = latents[:, 0, :, : of.latent]
            made = up.expand(flat, some) if up is not None else self.kv_b_proj(flat)
            made = made.unflatten(-1, (-1, both)).transpose(1, 2)
            shared = latents[..., of.latent :].expand(-1, made.shape[1], -1, -1)
            keys = torch.cat((made[..., : of.plain], shared), -1)
            out, weight = attend(self, q[:, some], keys, made[..., of.plain :], mask, **settings)
            outs.append(out)
            weights.append(weight)
        if len(outs) == 1:
            return outs[0], weights[0]
        return torch.cat(outs, 2), None if weights[0] is None else torch.cat(weights, 1)

    def _up_projection(self, x: torch.Tensor) -> _UpProjection | None:
        """The up-projection's weight and LoRA for the kernels; None where they do not read it, or somebody looks at its calls."""
        layer = self.kv_b_proj
        base = layer.get_base_layer() if isinstance(layer, InferenceLora) else layer
        weight = base.weight if isinstance(base, nn.Linear) else None
        if (
            weight is None
            or isinstance(weight, QuantizedTensor)
            or base.bias is not None
            or not fits(weight)
            or not FusedLinear.takes(x)
            or _is_watched(layer, base)
        ):
            return None
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())):
            return None
        active = layer.active() if isinstance(layer, InferenceLora) else ()
        kept, key = vars(layer).setdefault("_kt_fused", {}), ("latents", active)
        found: _UpProjection | None = kept.get(key)
        if found is None or not found.is_of(weight):
            found = kept[key] = _UpProjection(weight, [layer.factors(name) for name, _ in active], self._kt_contract)
        return found


class _UpProjection:
    """Weight [heads * (plain + values), latent] and LoRA of what makes keys and values of latents."""

    def __init__(self, weight: torch.Tensor, factors: Sequence[Factors], of: LatentContract):
        self._address, self._factors = weight.data_ptr(), list(factors)
        self._copied = Unchanged(tensor for a, b, _ in factors for tensor in (a, b))
        self._weight, self._of = weight.detach().unflatten(0, (of.heads, -1)), of
        self.keys = HeadProducts(self._weight[:, : of.plain], self._part(slice(None, of.plain)), transposed=True)
        """[..., heads, plain] -> [..., heads, latent]"""
        self.values = HeadProducts(self._weight[:, of.plain :], self._part(slice(of.plain, None)))
        """[..., heads, latent] -> [..., heads, values]"""
        self._some: dict[tuple[int, int], FusedLinear] = {}

    def is_of(self, weight: torch.Tensor) -> bool:
        """As :meth:`FusedLinear.is_of`."""
        return self._address == weight.data_ptr() and bool(self._copied)

    def _part(self, rows: slice) -> list[Factors]:
        return [(a, b.unflatten(0, (self._of.heads, -1))[:, rows], scaling) for a, b, scaling in self._factors]

    def expand(self, latents: torch.Tensor, heads: slice) -> torch.Tensor:
        """[B, n, latent] -> [B, n, some heads * (plain + values)]."""
        place = heads.start, heads.stop
        if place not in self._some:
            if len(self._some) > 2 * self._of.heads:  # their LoRA is copied
                self._some.clear()
            factors = [(a, b.unflatten(0, (self._of.heads, -1))[heads].flatten(0, 1), s) for a, b, s in self._factors]
            self._some[place] = FusedLinear(self._weight[heads].flatten(0, 1), None, factors)
        return self._some[place](latents)

    def __reduce__(self) -> Any:
        """As :class:`FusedLinear`'s: copies of a module make their own."""
        return type(None), ()


def _is_watched(*layers: nn.Module) -> bool:
    return any(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer) for layer in layers)


def keep_latents(model: nn.Module) -> None:
    """Let the attention modules of a model that are latent attention keep latents in the cache. Again after each change of the modules."""
    if not INTERNAL.usable or isinstance(library(), str):
        return
    known: dict[Any, LatentContract | None] = {}
    for module in model.modules():
        if not isinstance(module, LatentAttention) and (contract := read_contract(module, known)) is not None:
            vars(module)["_kt_contract"] = contract
            module.__class__ = _standing_in(type(module))


def latents_of(model: nn.Module) -> dict[int, int]:
    """layer -> numbers that its cache keeps of a token, of latent attention."""
    found = (module for module in model.modules() if isinstance(module, LatentAttention))
    return {module.layer_idx: module._kt_contract.latent + module._kt_contract.rotated for module in found}


def up_projections(model: nn.Module) -> set[nn.Module]:
    """The linear layers whose weights are also read transposed, and so have to stay numbers."""
    found = (module.kv_b_proj for module in model.modules() if isinstance(module, LatentAttention))
    return {layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in found}


def _standing_in(attention_class: Any) -> Any:
    if attention_class not in _classes:
        _classes[attention_class] = type(
            attention_class.__name__, (LatentAttention, attention_class), {"__module__": attention_class.__module__}
        )
    return _classes[attention_class]


_classes: dict[Any, type[LatentAttention]] = {}
