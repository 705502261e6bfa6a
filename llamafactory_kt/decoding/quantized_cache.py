"""``kt_cache: int8``: a cache that grows in place, and keeps keys and values as :mod:`codes of eight bits <..native.coded_rows>`.

Whoever computes attention gets all keys and values as they were encoded, those of the newest tokens among them: so a prompt at once, in parts
or token by token sees the same numbers. ``keys`` and ``values`` of a layer are the rows' words; what transformers does with them (crop, reorder,
select, repeat, reset) moves whole rows.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..model.growing_cache import Classes, GrowingLayer, GrowingSlidingLayer
from ..native.coded_rows import STORED, CodedRows, can_encode, decode, encode


class Int8Layer(GrowingLayer):
    """One layer's cache. What cannot be encoded (on a GPU, with gradients, without values, as latents are) is kept as it is."""

    _kt_forms: tuple[tuple[int, torch.dtype], ...]
    """width and dtype of what keys and values stand for"""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in transformers: [B, heads, T, d] -> all keys and values, as :class:`CodedRows`."""
        given = key_states, value_states
        if not all(map(can_encode, given)):
            self.keep_floats()
            return self.update(key_states, value_states, *args, **kwargs)
        self._kt_forms = tuple((states.shape[-1], states.dtype) for states in given)
        found = super().update(*map(encode, given))
        keys, values = (CodedRows(rows, *form) for rows, form in zip(found, self._kt_forms, strict=True))
        return keys, values

    def takes(self, key_states: torch.Tensor, value_states: torch.Tensor, keys: int | None) -> bool:
        """As a layer with floats; of encoded rows, and not as the first ones."""
        return self.is_initialized and key_states.dtype == STORED and super().takes(key_states, value_states, keys)

    def begin(self) -> None:
        """Encode what the layer, so far of another class, holds as floats."""
        if self.is_initialized and self.keys.dim() == 4:
            held = self.keys, self.values
            if all(map(can_encode, held)):
                self._kt_forms = tuple((states.shape[-1], states.dtype) for states in held)
                self.keys, self.values = map(encode, held)
            else:
                self.keep_floats()

    def keep_floats(self) -> None:
        """From now on another class, whose keys and values are floats."""
        if self.is_initialized and self.keys.dtype == STORED:
            held = zip((self.keys, self.values), self._kt_forms, strict=True)
            self.keys, self.values = (
                decode(rows, *form) if rows.dim() == 4 else rows.to(form[1]) for rows, form in held
            )
        self.__class__ = GrowingSlidingLayer if isinstance(self, DynamicSlidingWindowLayer) else GrowingLayer


class Int8SlidingLayer(Int8Layer, GrowingSlidingLayer):
    """Of a sliding window."""

    def activate_past_recording(self) -> None:
        """As in :class:`GrowingSlidingLayer`."""
        self.keep_floats()
        self.activate_past_recording()


INT8: Classes = {DynamicLayer: Int8Layer, DynamicSlidingWindowLayer: Int8SlidingLayer}
"""for :func:`~..model.growing_cache.let_grow`"""
