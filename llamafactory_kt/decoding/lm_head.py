"""The output layer on a prompt's last token, without copying its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def straighten_last_token(model: Any) -> None:
    """Give the output layer the last token's hidden state as a tensor of its own strides.

    Generation slices the last token out of a prompt's hidden states [B, T, H]. The slice [B, 1, H] keeps their strides, and
    ``torch.matmul`` (``should_fold`` in torch 2.9's LinearAlgebra.cpp) then multiplies batch by batch, which on the CPU copies the weight
    for every prompt. ``contiguous()`` alone leaves the strides of a single row as they are.
    """
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        head.register_forward_pre_hook(_straighten)


def _straighten(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden: torch.Tensor = args[0]
    return hidden.reshape(-1, hidden.shape[-1]).contiguous().view(hidden.shape), *args[1:]
