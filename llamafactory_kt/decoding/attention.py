"""Attention on the CPU.

PyTorch's fused kernel takes keys and values of the same size only (``check_head_dim_size_cpp`` in torch 2.9's sdp_utils_cpp.cpp). Models
with multi-head latent attention, such as DeepSeek's, have smaller values and fall back to unfused attention, which is far slower. Padded
with zeros, values are taken; the result ends with zeros, which are cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kt_sdpa"


def widen_values(model: Any) -> None:
    """Let a model with ``sdpa`` attention pad its values on the CPU, if they are smaller than its keys."""
    sizes = ((getattr(m, "qk_head_dim", 0), getattr(m, "v_head_dim", 0)) for m in model.modules())
    if model.config._attn_implementation == "sdpa" and any(0 < value < key for key, value in sizes):
        model.set_attn_implementation(NAME)


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
    if value.device.type == "cpu":
        value = F.pad(value, (0, key.shape[-1] - size))
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out[..., :size], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
