"""What a prompt leaves in a model's cache, and what it computes: of a model that is still empty, by its own forward on the meta device."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from ...checkpoint.discovery import ExpertsModule
from ...decoding.quantized_cache import INT8
from ...native.coded_rows import row_nbytes
from ..bench.memory import kept_by
from ..bench.parts import operations_of


def silence_experts(model: nn.Module, experts: Sequence[ExpertsModule]) -> None:
    """Let experts without values return what has their result's shape: which of them compute, values decide."""
    for info in experts:
        vars(model.get_submodule(info.name))["forward"] = _silent


def _silent(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def prompt(model: Any, tokens: int) -> tuple[list[Any], Counter[str]]:
    """(the layers of the cache after a prompt, part -> its floating-point operations), see :func:`~..bench.parts.operations_of`.

    Args:
        model: empty, its experts silent.
    """
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad(), torch.device("meta"), operations_of(model) as counted:
        cache = model(input_ids=ids, use_cache=True, **last).past_key_values
    return list(getattr(cache, "layers", ())), counted


def cache_bytes(layers: Sequence[Any], latents: dict[int, int], *, int8: bool) -> int:
    """Bytes of a cache as a chat keeps it.

    Args:
        layers: of :func:`prompt`.
        latents: layer -> numbers that its latent attention keeps of a token, in place of keys and values.
        int8: as ``kt_cache: int8`` has it, which leaves latents and what is no key or value.
    """
    total = 0
    for number, layer in enumerate(layers):
        kept = kept_by(layer)
        if number in latents and type(layer) is DynamicLayer:
            total += layer.keys.shape[-2] * latents[number] * layer.keys.itemsize
        elif int8 and type(layer) in INT8 and all(states.dim() == 4 and states.shape[-1] for states in kept):
            total += sum(states[..., 0].numel() * row_nbytes(states.shape[-1]) for states in kept)
        else:
            total += sum(states.nbytes for states in kept)
    return total
