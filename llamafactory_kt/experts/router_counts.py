"""Counting what routers choose: tokens and routing weight per expert, of prompts and of answers.

A router sees rows without knowing which of them are padding. The model's call does, so its gate notes it here, for the
layers of the same thread to read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

PROMPT, ANSWER = 0, 1

_local = threading.local()


class RouterCounts:
    """Counts of one layer. Rows of the arrays: prompt, answer."""

    def __init__(self, num_experts: int):
        self._lock = threading.Lock()
        self.tokens = np.zeros(2, np.int64)
        self.counts = np.zeros((2, num_experts), np.int64)
        """tokens that were routed to each expert"""
        self.weights = np.zeros((2, num_experts), np.float64)
        """sum of their routing weights"""

    def add(self, index: torch.Tensor, weights: torch.Tensor) -> None:
        """Count one call: index [T, K] int64 and weights [T, K], on the CPU; rows that are padding are left out."""
        phase, mask = getattr(_local, "call", (PROMPT, None))
        if mask is not None and len(mask) == len(index):
            index, weights = index[mask], weights[mask]
        size = self.counts.shape[1]
        chosen = index.detach().reshape(-1).numpy()
        counts = np.bincount(chosen, minlength=size)
        sums = np.bincount(chosen, weights.detach().reshape(-1).float().numpy(), minlength=size)
        with self._lock:
            self.tokens[phase] += len(index)
            self.counts[phase] += counts
            self.weights[phase] += sums

    def reset(self) -> None:
        """Start again from zero."""
        with self._lock:
            for array in (self.tokens, self.counts, self.weights):
                array[:] = 0

    def snapshot(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies of (tokens [2], counts [2, E], weights [2, E]) that belong together."""
        with self._lock:
            return self.tokens.copy(), self.counts.copy(), self.weights.copy()


@contextlib.contextmanager
def generation(model: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Around ``model.generate(**kwargs)``: rows of a batch that have ended go on as padding, which is told by their end
    token."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    ends = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
    before = getattr(_local, "batch", None)
    _local.batch = _Batch([] if ends is None else ends if isinstance(ends, list) else [ends])
    try:
        yield
    finally:
        _local.batch = before


@contextlib.contextmanager
def call(kwargs: dict[str, Any]) -> Iterator[None]:
    """Around ``model.forward(**kwargs)``: notes which rows are tokens, and whether they are of a prompt or an answer."""
    ids, embeds, mask = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    tokens = ids if ids is not None else embeds
    before = getattr(_local, "call", None)
    if tokens is None or tokens.dim() < 2:
        _local.call = (PROMPT, None)
    else:
        rows, length = tokens.shape[:2]
        kind = phase(kwargs)
        real = None
        if rows > 1 or length > 1:
            if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
                real = mask[:, -length:].bool().cpu()
            batch: _Batch | None = getattr(_local, "batch", None)
            if batch is not None and kind == ANSWER and ids is not None:
                alive = batch.alive(ids)
                real = alive if real is None else real & alive
            real = None if real is None or bool(real.all()) else real.reshape(-1)
        _local.call = (kind, real)
    try:
        yield
    finally:
        if before is None:
            del _local.call
        else:
            _local.call = before


def phase(kwargs: dict[str, Any]) -> int:
    """Of ``model.forward(**kwargs)``: one new token on a cache that is not empty is of an answer, all else of a prompt."""
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    cache = kwargs.get("past_key_values")
    one = isinstance(tokens, torch.Tensor) and tokens.dim() >= 2 and tokens.shape[1] == 1
    return ANSWER if one and cache is not None and cache.get_seq_length() else PROMPT


class _Batch:
    """Which rows of a batch that is being generated have ended."""

    def __init__(self, ends: list[int]):
        self._ends = torch.tensor(ends, dtype=torch.int64)
        self._ended: torch.Tensor | None = None

    def alive(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, 1] of one step -> [B, 1] bool; a row that got its end token has ended with it."""
        ended = torch.isin(ids.cpu(), self._ends)
        self._ended = ended if self._ended is None else self._ended | ended
        return ~self._ended
