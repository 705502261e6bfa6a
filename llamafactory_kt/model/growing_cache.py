"""A cache of keys and values that grows in place. transformers' own copies all of it for each token (``torch.cat``)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..ground.internals import TESTED, Internal, cache_of
from ..native.recording import active
from .state import has_kt_experts, kt_state

INTERNAL = Internal("growing-cache", "transformers", TESTED["transformers"])
_LEAST = 256
"""rows to come that new memory has room for, at least"""


class Room:
    """Memory [B, heads, capacity, d] with room for rows to come; the capacity doubles when it is full.

    Args:
        owner: ``id`` of the layer that grows in it.
    """

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.memory: torch.Tensor | None = None

    def extended(self, kept: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """``torch.cat((kept, new), -2)``, but for the new rows, whose values are yet to be written. ``kept`` stays where it is if it is
        the end of what was extended last."""
        memory, held, rows = self.memory, 0 if kept is None else kept.shape[-2], new.shape[-2]
        if kept is not None and not _alike(kept, new):
            return torch.cat((kept, new), -2)  # of wider dtype, or an error that says what is wrong
        if memory is not None and kept is not None and kept.stride() == memory.stride() and held:
            start, rest = divmod((kept.data_ptr() - memory.data_ptr()) // memory.itemsize, memory.stride(2))
            if (
                not rest
                and start >= 0
                and start + held + rows <= memory.shape[2] <= 4 * (held + rows + _LEAST)
                and kept.shape[:2] == memory.shape[:2]
            ):
                return memory[:, :, start : start + held + rows]
        batch, heads, _, width = new.shape
        with torch.inference_mode(False):  # its tensors could be changed in that mode only
            memory = torch.empty(
                batch, heads, held + rows + max(held + rows, _LEAST), width, dtype=new.dtype, device=new.device
            )
        if kept is not None and held:
            memory[:, :, :held] = kept
        self.memory = memory
        return memory[:, :, : held + rows]


def _alike(kept: torch.Tensor, new: torch.Tensor) -> bool:
    shape = kept.shape
    return kept.dtype == new.dtype and (shape[0], shape[1], shape[3]) == (new.shape[0], new.shape[1], new.shape[3])


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's cache. Stands in as the class of a ``DynamicLayer``, at any time."""

    def begin(self) -> None:
        """Called when the layer gets this class."""

    def rooms(self) -> tuple[Room, Room]:
        """Of keys and values. A copy of a layer (``copy.copy``) begins with rooms of its own: two must not write to the same rows."""
        found: tuple[Room, Room] | None = vars(self).get("_kt_rooms")
        if found is None or found[0].owner != id(self):
            found = self._kt_rooms = Room(id(self)), Room(id(self))
        return found

    def extend(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values that the new tokens see, [B, heads, n, d]; their last rows, the new ones, are yet to be written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.keys.dim() == 4
        of_keys, of_values = self.rooms()
        keys = of_keys.extended(self.keys if held else None, key_states)
        values = of_values.extended(self.values if held else None, value_states)
        self.keep(keys, values, key_states.shape[-2])
        return keys, values

    def keep(self, keys: torch.Tensor, values: torch.Tensor, new: int) -> None:
        self.keys, self.values = keys, values

    def takes(self, key_states: torch.Tensor, value_states: torch.Tensor, keys: int | None) -> bool:
        """Whether :meth:`extend` takes these as they are, and returns so many keys; None for any number."""
        if not self.is_initialized or self.keys.dim() != 4:
            return key_states.is_floating_point() and keys in (None, key_states.shape[-2])
        return (
            (keys is None or keys == self.keys.shape[-2] + key_states.shape[-2])
            and _alike(self.keys, key_states)
            and _alike(self.values, value_states)
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in transformers: [B, heads, T, d] -> all keys and values."""
        recorder, new = active.recorder, key_states.shape[-2]
        with recorder.pause() if recorder is not None else contextlib.nullcontext():
            keys, values = self.extend(key_states, value_states)
            first = keys.shape[-2] - new
            keys[:, :, first:], values[:, :, first:] = key_states, value_states
        if recorder is not None:
            recorder.note("append", self, (key_states, value_states, keys, values), None)
        return keys, values


class GrowingSlidingLayer(GrowingLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Keeps the rows that the next token sees; when its memory is full, they move to the start of a new one."""

    def keep(self, keys: torch.Tensor, values: torch.Tensor, new: int) -> None:
        self.cumulative_length += new
        first = -self.sliding_window + 1
        self.keys, self.values = keys[:, :, first:], values[:, :, first:]

    def activate_past_recording(self) -> None:
        """From now on as in transformers, which keeps rows beyond the window for a while."""
        self.__class__ = DynamicSlidingWindowLayer
        self.activate_past_recording()


Classes = dict[type[DynamicLayer], type[GrowingLayer]]
GROWING: Classes = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingSlidingLayer}


def let_grow(cache: Any, classes: Classes = GROWING) -> None:
    """Let a cache grow in place, whatever it holds already. Other kinds of caches and layers are left.

    Args:
        classes: of layers, for those of transformers.
    """
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = classes[DynamicLayer]
    for layer in cache.layers:
        if (growing := classes.get(type(layer))) is not None and not getattr(layer, "record_past", False):
            layer.__class__ = growing
            layer.begin()


def let_grow_once(cache: Any, classes: Classes) -> None:
    """:func:`let_grow`, unless that was done."""
    if "_kt_grows" not in vars(cache):
        let_grow(cache, classes)
        vars(cache)["_kt_grows"] = True


def grow_caches(model: nn.Module, classes: Classes = GROWING) -> None:
    """Let the caches grow with which a model is called, or a model inside of it: PEFT calls ``forward``, which has no hooks."""

    def before_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (cache := cache_of(kwargs)) is not None:
            let_grow_once(cache, classes)

    for module in model.modules() if INTERNAL.usable else ():
        if isinstance(module, PreTrainedModel):
            module.register_forward_pre_hook(before_call, with_kwargs=True)


def through_cache(model: Any) -> dict[str, Any]:
    """Arguments of a call in which attention sees what a chat's cache keeps of keys and values; none where that is all of them."""
    if not (has_kt_experts(model) and kt_state(model).options.cache_bits):
        return {}
    return {"use_cache": True, "past_key_values": DynamicCache(config=model.config)}
