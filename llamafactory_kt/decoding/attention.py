"""Attention on the CPU.

PyTorch's fused kernel takes keys and values of the same size only (``check_head_dim_size_cpp`` in torch 2.9's sdp_utils_cpp.cpp). Models
with multi-head latent attention, such as DeepSeek's, have smaller values and fall back to unfused attention, which is far slower. Padded
with zeros, values are taken; the result ends with zeros, which are cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def widen_values(model: Any) -> None:
    """Let a model with ``sdpa`` attention pad its values on the CPU, if they are smaller than its keys.

    The padding stands in for ``sdpa`` under that very name, and pads for the modules marked here alone: models with sparse
    attention (DeepSeek-V3.2's) ask whether the implementation is called ``sdpa``, and leave out their mask where it is not.
    """
    if model.config._attn_implementation != "sdpa":
        return
    for module in model.modules():
        if 0 < getattr(module, "v_head_dim", 0) < getattr(module, "qk_head_dim", 0):
            module._kt_widens_values = True
            AttentionInterface.register("sdpa", _attention)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query, key [B, heads, T, d], value [B, heads, T, dv] -> ([B, T, heads, dv], None)."""
    size = value.shape[-1]
    if value.device.type == "cpu" and getattr(module, "_kt_widens_values", False):
        value = F.pad(value, (0, key.shape[-1] - size))
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out[..., :size], None
