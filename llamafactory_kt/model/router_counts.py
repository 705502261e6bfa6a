"""Counting what routers choose: tokens and routing weight per expert, of prompts and of answers.

A router sees rows without knowing which of them are padding. The call of the model knows, so it is noted here, for the layers of the
same thread to read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..ground.internals import cache_of

PROMPT, ANSWER = 0, 1

_local = threading.local()

KEPT_ROWS = 1024
"""rows that are kept before they are added up, which is cheaper than adding up each token"""


class RouterCounts:
    """Counts of one layer. Rows of the arrays: prompt, answer."""

    def __init__(self, num_experts: int):
        self._lock = threading.Lock()
        self._tokens = np.zeros(2, np.int64)
        self._counts = np.zeros((2, num_experts), np.int64)
        self._weights = np.zeros((2, num_experts), np.float64)
        self._kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._rows = 0

    def add(self, index: torch.Tensor, weights: torch.Tensor) -> None:
        """Count one call: index [T, K] int64 and weights [T, K], on the CPU. Padding is left out."""
        if getattr(_local, "uncounted", False):
            return
        phase, mask = getattr(_local, "call", (PROMPT, None))
        if mask is not None and len(mask) == len(index):
            index, weights = index[mask], weights[mask]
        with self._lock:
            self._kept.append((phase, index, weights))
            self._rows += len(index)
            if self._rows >= KEPT_ROWS:
                self._add_up()

    def _add_up(self) -> None:
        """Move what is kept into the counts. The caller holds the lock."""
        size = self._counts.shape[1]
        for phase in {phase for phase, *_ in self._kept}:
            mine = [(index, weights) for each, index, weights in self._kept if each == phase]
            index, weights = (torch.cat(tensors).detach() for tensors in zip(*mine, strict=True))
            chosen = index.reshape(-1).numpy()
            self._tokens[phase] += len(index)
            self._counts[phase] += np.bincount(chosen, minlength=size)
            self._weights[phase] += np.bincount(chosen, weights.reshape(-1).float().numpy(), minlength=size)
        self._kept, self._rows = [], 0

    def reset(self) -> None:
        """Start again from zero."""
        with self._lock:
            self._kept, self._rows = [], 0
            for array in (self._tokens, self._counts, self._weights):
                array[:] = 0

    def snapshot(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies, taken together, of: tokens [2], tokens routed to each expert [2, E], sums of their routing weights [2, E]."""
        with self._lock:
            self._add_up()
            return self._tokens.copy(), self._counts.copy(), self._weights.copy()


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Calls of the model, in this thread, that are about the model and no conversation's."""
    _local.uncounted = True
    try:
        yield
    finally:
        _local.uncounted = False


@contextlib.contextmanager
def generation(model: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Around ``model.generate(**kwargs)``: rows of a batch that have reached their end token go on as padding."""
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
    """What ``model.forward(**kwargs)`` computes: one new token on a cache that is not empty is an answer's, all else a prompt's."""
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    cache = cache_of(kwargs)
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
