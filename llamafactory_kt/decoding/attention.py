"""Attention on the CPU, on the native kernels where they know it, else PyTorch's.

PyTorch's fused kernel for the CPU works head by head and block by block also for a single query, on keys that are repeated for each head of
a group. It takes keys and values of the same size only (``check_head_dim_size_cpp`` in torch 2.9's sdp_utils_cpp.cpp): smaller values, as
in models with multi-head latent attention, are padded with zeros for it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..native import calls
from ..native.library import DTYPES, library

_MARK = "_kt_attends"
NAME = "kt_native"
"""of the attention of models that have none of PyTorch's fused kinds"""
_PLAIN = {"scaling", "dropout", "is_causal", "sliding_window", "s_aux", "position_ids", "cache_position"}
"""arguments of attention functions that are understood here, beside switches of what is returned"""


def use_native_attention(model: Any) -> None:
    """Let a model with ``sdpa`` attention compute it here, and one that has only an eager attention of its own, as gpt-oss, whose softmax
    has a sink.

    The first function stands in for ``sdpa`` under that very name, and acts for the modules marked here alone: models with sparse attention
    (DeepSeek-V3.2's) ask whether the implementation is called ``sdpa``, and leave out their mask where it is not.
    """
    config, kind = model.config.get_text_config(), model.config._attn_implementation
    if kind == "sdpa":
        for module in model.modules():
            vars(module)[_MARK] = True
        AttentionInterface.register("sdpa", _in_place_of_sdpa)
    elif (
        kind == "eager"
        and not model._supports_sdpa
        and model._supports_attention_backend
        and not isinstance(library(), str)
    ):
        AttentionInterface.register(NAME, _in_place_of_eager)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        config._attn_implementation = NAME


def _in_place_of_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query, key [B, heads, T, d], value [B, heads, T, dv] -> ([B, T, heads, dv], None)."""
    if value.device.type != "cpu" or _MARK not in vars(module):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    if (found := _native(module, query, key, value, attention_mask, kwargs)) is not None:
        return found, None
    size = value.shape[-1]
    if size < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - size))
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out[..., :size], None


def _in_place_of_eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`_in_place_of_sdpa`, whose masks this one gets, too. What the kernels do not know, the model's own function computes."""
    plain = all(name in _PLAIN or given is None or isinstance(given, bool) for name, given in kwargs.items())
    if plain and (found := _native(module, query, key, value, attention_mask, kwargs)) is not None:
        return found, None
    mask = attention_mask
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril(
            key.shape[2] - query.shape[2]
        )
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    out: tuple[torch.Tensor, torch.Tensor | None] = eager(module, query, key, value, mask, **kwargs)
    return out


def _native(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> torch.Tensor | None:  # fmt: skip
    """[B, T, heads, dv], on the kernels; None where they do not know it."""
    seen = view(module, query, key, value, mask, kwargs)
    return attend(query, key, value, seen, kwargs) if seen is not None else None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: View, kwargs: dict[str, Any]
) -> torch.Tensor:
    """[B, T, heads, dv], on the kernels."""
    scale, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    sinks = sinks.detach().float() if sinks is not None else None
    return calls.attention(
        query, key, value, scale, view.window, sinks, mask=view.keys, threads=torch.get_num_threads()
    )


def _is_known(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the kernels read such tensors."""
    tensors = query, key, value
    plain = query.dtype in DTYPES and all(t.dtype == query.dtype and t.stride(-1) == 1 for t in tensors)
    no_grad = not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    return (
        plain
        and no_grad
        and not torch.compiler.is_compiling()
        and not kwargs.get("dropout")
        and not isinstance(library(), str)
    )


@dataclass(frozen=True)
class View:
    """What the queries, the last positions of the keys, see: keys up to their own position."""

    window: int = 0
    """so many at most, their own included; 0 for all"""
    keys: torch.Tensor | None = None
    """[B, keys], bool: those that are seen at all; None for all"""


def view(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> View | None:  # fmt: skip
    """What a mask lets the queries see; None where the kernels do not know it, or do not read such tensors."""
    if not _is_known(query, key, value, kwargs):
        return None
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return View() if queries == 1 or (causal and queries == keys) else None
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, queries, keys):
        return None
    if queries == 1:
        return View(keys=mask[:, 0, 0].expand(query.shape[0], -1).contiguous())
    window = kwargs.get("sliding_window") or 0
    known: dict[int, View | None] = vars(mask).setdefault("_kt_views", {})  # all layers get the same mask
    if window not in known:
        known[window] = next((v for w in {0, window} if (v := _as_view(mask, w, len(query))) is not None), None)
    return known[window]


def _as_view(mask: torch.Tensor, window: int, batch: int) -> View | None:
    """A mask [B or 1, 1, queries, keys] as a view, if it is one."""
    queries, keys = mask.shape[2:]
    seen = mask.any(2)  # [B or 1, 1, keys]
    own = torch.arange(keys - queries, keys)[:, None]
    others = torch.arange(keys)
    causal = (others <= own) & (others > own - window) if window else others <= own
    if not torch.equal(mask, causal & seen[:, :, None]):
        return None
    return View(window, seen[:, 0].expand(batch, -1).contiguous())
