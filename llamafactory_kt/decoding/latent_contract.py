"""Which modules are multi-head latent attention, of which sizes, and how they rotate: learnt from their parts and their own forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..ground.internals import CACHE_ARGUMENTS

_QUERY = {"q_proj"}, {"q_a_proj", "q_a_layernorm", "q_b_proj"}
_OTHERS = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
_ROTARIES = "complex", "halves", "pairs", "pairs of the first half", "none"


@dataclass(frozen=True)
class LatentContract:
    """What is known of one module."""

    heads: int
    plain: int
    """size of a head's query and key that is not rotated"""
    rotated: int
    """size of the part that is, and that all heads' keys share"""
    latent: int
    values: int
    """size of a head's values"""
    rotary: str
    """one of :func:`rotated`'s"""
    cache: str
    """the argument that is the cache"""
    arguments: tuple[str, ...]
    """of the forward, behind the hidden states"""

    def absorbs(self, queries: int, keys: int) -> bool:
        """Whether fewer numbers are multiplied if the up-projection moves to the queries than if it makes keys and values."""
        up = self.latent * (self.plain + self.values)
        seen = queries * keys - queries * (queries - 1) // 2
        here = seen * (2 * self.latent + self.rotated) + queries * up
        return here <= seen * (self.plain + self.rotated + self.values) + keys * up


def rotated(rotary: str, q: torch.Tensor, k: torch.Tensor, positions: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, heads, T, d] and k [B, 1, T, d] with the rotation of their positions.

    Args:
        rotary: ``complex``: of neighbors, by complex numbers [B, T, d / 2]; ``halves``: of numbers half of d apart, by cosines and sines
            [B, T, d] each; ``pairs``: of neighbors, which come to lie half of d apart; ``none``.
    """
    if rotary == "none":
        return q, k
    if rotary == "complex":
        turn = positions[:, None]
        return _turned(q, turn), _turned(k, turn)
    cos, sin = (part[:, None] for part in positions)
    if rotary == "halves":
        return _rotate(q, cos, sin), _rotate(k, cos, sin)
    if rotary == "pairs of the first half":
        half = cos.shape[-1] // 2
        cos, sin = (torch.cat((part[..., :half],) * 2, -1) for part in (cos, sin))
    return tuple(_rotate(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos, sin) for x in (q, k))  # type: ignore[return-value]


def has_query(module: nn.Module) -> bool:
    """Whether queries are one product, and have no latents of their own."""
    return module._modules.get("q_proj") is not None


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def read_contract(module: nn.Module, known: dict[Any, LatentContract | None]) -> LatentContract | None:
    """What a module computes; None if it is something else.

    Args:
        known: modules of the same class, sizes and settings are tried once.
    """
    sizes = _sizes(module)
    if sizes is None:
        return None
    settings = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    settings.pop("layer_idx", None)
    key = type(module), id(module.config), sizes, tuple(sorted(settings.items()))
    if key not in known:
        known[key] = next(_agreeing(module, *sizes), None)
    return known[key]


def _sizes(module: nn.Module) -> tuple[int, int, int, int, int] | None:
    """Heads, plain, rotated, latent, values: what the shapes of the parts leave open to nothing else."""
    parts = {name for name, part in module._modules.items() if part is not None}
    query = next((names for names in _QUERY if parts == names | _OTHERS), None)
    if query is None or module._parameters or module._buffers or "forward" in vars(module):
        return None
    layers: dict[str, Any] = {
        name: getattr(part, "base_layer", part)
        for name, part in module._modules.items()
        if name.endswith(("proj", "mqa"))
    }
    if not all(isinstance(layer, nn.Linear) for layer in layers.values() if layer is not None):
        return None
    q = layers["q_proj" if "q_proj" in query else "q_b_proj"].out_features
    latent, up = layers["kv_b_proj"].in_features, layers["kv_b_proj"].out_features
    out, turned = layers["o_proj"].in_features, layers["kv_a_proj_with_mqa"].out_features - latent
    # q = heads (plain + turned), up = heads (plain + values), out = heads values
    heads = (q - up + out) // turned if turned > 0 else 0
    if heads <= 0 or any(n % heads for n in (q, up, out)) or q // heads != (up - out) // heads + turned:
        return None
    return heads, (up - out) // heads, turned, latent, out // heads


def _agreeing(
    module: nn.Module, heads: int, plain: int, turned: int, latent: int, values: int
) -> Iterator[LatentContract]:
    """The contracts whose results are those of the module's own forward."""
    signature = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    names = [name for name, own in signature.items() if own.kind is not own.VAR_KEYWORD][1:]
    cache = next((name for name in CACHE_ARGUMENTS if name in names), None)
    if (
        cache is None
        or names[0] != "hidden_states"
        or not {*names[1:]} <= {"position_embeddings", "attention_mask", cache}
    ):
        return
    for rotary in _ROTARIES:
        own = LatentContract(heads, plain, turned, latent, values, rotary, cache, tuple(names[1:]))
        try:
            with torch.device("cpu"), torch.no_grad():
                agrees = _Trial(module, own).agrees()
        except Exception:  # of code that is not ours, called in its own way
            continue
        if agrees:
            yield own


class _Trial:
    """Runs a module's forward with the sizes of its heads, but few of them, and random weights."""

    HEADS, HIDDEN, LOW = 3, 20, 12

    def __init__(self, module: nn.Module, contract: LatentContract):
        self.contract, self._generator = contract, torch.Generator().manual_seed(0)
        of, heads = contract, self.HEADS
        sizes = {
            "q_proj": (self.HIDDEN, heads * (of.plain + of.rotated)), "q_a_proj": (self.HIDDEN, self.LOW), "q_a_layernorm": (self.LOW, self.LOW),
            "q_b_proj": (self.LOW, heads * (of.plain + of.rotated)), "kv_a_proj_with_mqa": (self.HIDDEN, of.latent + of.rotated),
            "kv_a_layernorm": (of.latent, of.latent), "kv_b_proj": (of.latent, heads * (of.plain + of.values)),
            "o_proj": (heads * of.values, self.HIDDEN),
        }  # fmt: skip
        self.tiny: Any = copy(module)
        self.tiny._modules = {
            name: self._layer(*sizes[name]) if part is not None else None for name, part in module._modules.items()
        }
        for name in ("num_heads", "num_attention_heads", "num_key_value_heads"):
            if hasattr(self.tiny, name):
                vars(self.tiny)[name] = heads
        vars(self.tiny)["layer_idx"] = 0

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _layer(self, width: int, out: int) -> nn.Linear:
        layer = nn.Linear(width, out, dtype=torch.float32)
        layer.weight.data.copy_(self._random(out, width) * width**-0.5)
        layer.bias.data.copy_(self._random(out) * 0.1)
        return layer.requires_grad_(False)

    def agrees(self) -> bool:
        """Whether a prompt, and a token after it, are what the contract says."""
        cache, before = DynamicCache(), None
        for tokens in (5, 1):
            x, positions = self._random(2, tokens, self.HIDDEN), self._positions(tokens)
            named = {"position_embeddings": positions, "attention_mask": None, self.contract.cache: cache}
            given = {name: value for name, value in named.items() if name in self.contract.arguments}
            numbers = torch.arange(10**6, 10**6 + tokens)[None]  # where rules for long contexts show
            found = type(self.tiny).forward(self.tiny, hidden_states=x, position_ids=numbers, **given)
            wanted, before = self._wanted(x, positions, before)
            if not (isinstance(found, tuple) and len(found) == 2 and found[0].shape == wanted.shape):
                return False
            if not torch.allclose(found[0].float(), wanted, rtol=1e-3, atol=1e-4):
                return False
        return True

    def _positions(self, tokens: int) -> Any:
        size = self.contract.rotated
        if self.contract.rotary == "complex":
            return torch.complex(self._random(2, tokens, size // 2), self._random(2, tokens, size // 2))
        return self._random(2, tokens, size), self._random(2, tokens, size)

    def _wanted(
        self, x: torch.Tensor, positions: Any, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, and the latents so far."""
        of, tiny = self.contract, self.tiny
        q = tiny.q_proj(x) if has_query(tiny) else tiny.q_b_proj(tiny.q_a_layernorm(tiny.q_a_proj(x)))
        q, low = q.unflatten(-1, (self.HEADS, -1)).transpose(1, 2), tiny.kv_a_proj_with_mqa(x)
        latent = tiny.kv_a_layernorm(low[..., : of.latent])[:, None]
        turned, shared = rotated(of.rotary, q[..., of.plain :], low[:, None, :, of.latent :], positions)
        latents = torch.cat((latent, shared), -1)
        latents = latents if before is None else torch.cat((before, latents), 2)
        made = tiny.kv_b_proj(latents[..., : of.latent][:, 0]).unflatten(-1, (self.HEADS, -1)).transpose(1, 2)
        scores = q[..., : of.plain] @ made[..., : of.plain].mT + turned @ latents[..., of.latent :].mT
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(scores.shape[-1] - scores.shape[-2] + 1)
        weights = (scores * tiny.scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        sums = (weights @ made[..., of.plain :]).transpose(1, 2).flatten(2)
        return tiny.o_proj(sums), latents
