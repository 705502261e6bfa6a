"""transformers' caches cut, copied and put back.

Attention over all tokens can be cut anywhere. A sliding window forgets, and linear attention keeps sums instead of tokens: they go back
only to where their *state* was copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

State = dict[str, Any]
"""a layer's attributes, the tensors copied"""
States = dict[int, State]
"""of the layers that cannot be cut, by number"""
_FORGETTING = DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
KNOWN = {
    *(
        "DynamicLayer",
        "GrowingLayer",
        "Int8Layer",
        "DynamicSlidingWindowLayer",
        "GrowingSlidingLayer",
        "Int8SlidingLayer",
    ),
    *("LinearAttentionLayer", "DummyLayer"),
}
"""classes; the last holds nothing"""
_FORMS = "_kt_forms"
"""what the rows of a cache in eight bits stand for (:mod:`..decoding.quantized_cache`)"""
_ROOMS = "_kt_rooms"
"""the memory in which a layer of :mod:`..model.growing_cache` grows; a copy gets its own"""


def are_known(cache: Any) -> bool:
    """Whether all of a cache's layers, also those to come, are of kinds that are cut and copied here. Others keep more of the past."""
    to_come = cache.layer_class_to_replicate
    return {type(layer).__name__ for layer in cache.layers} | ({to_come.__name__} if to_come else set()) <= KNOWN


def length(cache: Any) -> int | None:
    """Tokens in all of a cache's layers; None if they differ, as after an error in the middle."""
    found = {int(layer.get_seq_length()) for layer in cache.layers if isinstance(layer, DynamicLayer)}
    return found.pop() if len(found) == 1 else None


def forgets(cache: Any) -> bool:
    """Whether some layers cannot be cut, or cannot once they hold more."""
    return any(isinstance(layer, _FORGETTING) for layer in cache.layers)


def _can_be_cut(layer: Any) -> bool:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return bool(layer.keys.shape[-2] == layer.cumulative_length)  # nothing is forgotten yet
    return not isinstance(layer, LinearAttentionCacheLayerMixin)


def fixed(cache: Any) -> list[int]:
    """The numbers of the layers that cannot be cut."""
    return [number for number, layer in enumerate(cache.layers) if not _can_be_cut(layer)]


def states_of(cache: Any) -> States:
    """The states, now, of all layers that cannot be cut, or may not once they hold more."""
    return {number: _state(layer) for number, layer in enumerate(cache.layers) if isinstance(layer, _FORGETTING)}


def cut(cache: Any, tokens: int, states: States) -> None:
    """Forget all but the first tokens, in place.

    Args:
        states: of the layers that cannot be cut, after so many tokens.
    """
    for number, layer in enumerate(cache.layers):
        _restrict(layer, tokens, states.get(number), own=True)


def copied(cache: Any, tokens: int, states: States) -> Any:
    """The first tokens of a cache, as a new one."""
    new = copy(cache)
    new.layers = [copy(layer) for layer in cache.layers]
    for number, layer in enumerate(new.layers):
        _restrict(layer, tokens, states.get(number), own=False)
    return new


def _restrict(layer: Any, tokens: int, state: State | None, own: bool) -> None:
    if not own:
        vars(layer).pop(_ROOMS, None)
    if state is not None and not _can_be_cut(layer):
        vars(layer).update(_copies(state))
    elif isinstance(layer, DynamicLayer):
        with torch.inference_mode(False):
            kept = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]
            layer.keys, layer.values = kept if own else map(torch.clone, kept)
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = tokens
    elif not own:
        vars(layer).update(_state(layer))


def _state(layer: Any) -> State:
    return _copies({name: value for name, value in vars(layer).items() if name != _ROOMS})


def _copies(state: State) -> State:
    with torch.inference_mode(False):
        return tree_map_only(torch.Tensor, torch.clone, state)  # type: ignore[no-any-return]


def park(cache: Any) -> None:
    """Move what a cache of a GPU holds to the CPU, whose memory is larger."""
    _move(cache, torch.device("cpu"))


def unpark(cache: Any) -> None:
    """Move it back to where each layer computes."""
    _move(cache, None)


def _move(cache: Any, to: torch.device | None) -> None:
    for layer in cache.layers:
        home = getattr(layer, "device", None)
        if home is None or home.type == "cpu":
            continue
        vars(layer).pop(_ROOMS, None)
        with torch.inference_mode(False):
            vars(layer).update(tree_map_only(torch.Tensor, partial(torch.Tensor.to, device=to or home), vars(layer)))


def parts(cache: Any, tokens: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The first tokens of a cache that can be cut: tensors by name, and of each layer what is no tensor (JSON values)."""
    tensors: dict[str, torch.Tensor] = {}
    kinds = []
    for number, layer in enumerate(cache.layers):
        kind: dict[str, Any] = {"class": type(layer).__name__}
        if isinstance(layer, DynamicLayer):
            tensors |= {f"{number}.{name}": getattr(layer, name)[..., :tokens, :] for name in ("keys", "values")}
            kind["forms"] = [[width, _name(dtype)] for width, dtype in getattr(layer, _FORMS, ())]
        kinds.append(kind)
    return tensors, kinds


def fill(cache: Any, tokens: int, tensors: Mapping[str, torch.Tensor], kinds: Sequence[Mapping[str, Any]]) -> None:
    """The opposite, into an empty cache with layers of the same classes.

    Raises:
        ValueError: They are not.
    """
    if [type(layer).__name__ for layer in cache.layers] != [kind["class"] for kind in kinds]:
        raise ValueError("its layers are of other classes")
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicLayer):
            continue
        with torch.inference_mode(False):
            keys, values = (tensors[f"{number}.{name}"].clone() for name in ("keys", "values"))
        if not keys.shape[-2] == values.shape[-2] == tokens:
            raise ValueError(f"layer {number} has keys of {keys.shape[-2]} tokens")
        forms = tuple((width, getattr(torch, dtype)) for width, dtype in kinds[number]["forms"])
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if forms:
            setattr(layer, _FORMS, forms)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = tokens


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def nbytes(cache: Any, states: Iterable[States] = ()) -> int:
    """Bytes of a cache's tokens, and of states. Room to grow is not counted: nothing is in it yet."""
    kept = [value for layer in cache.layers for name, value in vars(layer).items() if name != _ROOMS]
    kept += [value for each in states for state in each.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in tree_leaves(kept) if isinstance(tensor, torch.Tensor))
