"""Prompts and answers that were computed, with their caches. The least recently used go first."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import layers
from .layers import States

LEAST = 16
"""tokens that must be alike: fewer are not worth a copy"""
MOST = 1024
"""sequences: looking through them takes less than a token"""
TAIL = 32
"""tokens that a conversation may lose in place, such as the end of an answer that its template writes otherwise. What is longer may be
wanted again: the beginning is copied."""


@dataclass(eq=False)
class Kept:
    """A sequence of tokens and its cache."""

    key: Hashable
    """of the weights: equal tokens of another adapter are something else"""
    ids: np.ndarray
    """int64 [T], those that the cache holds"""
    cache: Any
    marks: dict[int, States] = field(default_factory=dict)
    """number of tokens -> states after them, of the layers that cannot be cut"""

    def __post_init__(self) -> None:
        self.nbytes = layers.nbytes(self.cache, self.marks.values())

    def reaches(self, tokens: int) -> int:
        """The most tokens, of the first so many, to which the cache can go back."""
        if tokens >= len(self.ids) or not layers.fixed(self.cache):
            return min(tokens, len(self.ids))
        return max((mark for mark in self.marks if mark <= tokens), default=0)


class PromptPool:
    """What is kept between generations, of several conversations; any thread may use it.

    Args:
        nbytes: the most that all of it may take.
        directory: where beginnings that conversations share are kept in files, which may take as much.
    """

    def __init__(self, nbytes: int, directory: Path | None = None):
        self.most_nbytes, self.directory = nbytes, directory
        self._kept: list[Kept] = []
        """the least recently used first"""
        self._lock = threading.Lock()

    def take(self, ids: np.ndarray, key: Hashable, most: int) -> Kept | None:
        """The longest beginning of a sequence that is there, at most so many tokens; None if there is none worth it.

        It is the caller's alone until :meth:`keep`.
        """
        with self._lock:
            found, tokens = None, LEAST
            for kept in self._kept:
                alike = min(_alike(kept.ids, ids), most) if kept.key == key else 0
                if alike >= tokens and (reached := kept.reaches(alike)) >= tokens:  # of equals, the one used last
                    found, tokens = kept, reached
            if found is None:
                return None
            self._kept.remove(found)
            states = found.marks.get(tokens, {})
            marks = {mark: of for mark, of in found.marks.items() if mark <= tokens}
            if len(found.ids) - tokens <= TAIL:
                cache = found.cache
                layers.cut(cache, tokens, states)
            else:
                self._kept.append(found)
                cache = layers.copied(found.cache, tokens, states)
            layers.unpark(cache)
            return Kept(key, ids[:tokens], cache, marks)

    def keep(self, kept: Kept) -> None:
        """Keep a sequence for later, in place of those that it begins with."""
        with self._lock:
            self._kept = [
                old
                for old in self._kept
                if old.key != kept.key
                or _alike(old.ids, kept.ids) < len(old.ids)
                or kept.reaches(len(old.ids)) < len(old.ids)
            ]
            if kept.nbytes > self.most_nbytes:
                return
            self._kept.append(kept)
            while self.nbytes > self.most_nbytes or len(self._kept) > MOST:
                del self._kept[0]

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(kept.nbytes for kept in self._kept)

    @property
    def sequences(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()


def _alike(first: np.ndarray, second: np.ndarray) -> int:
    """The length of the beginning that two sequences share.

    >>> _alike(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    shared = min(len(first), len(second))
    different = np.flatnonzero(first[:shared] != second[:shared])
    return int(different[0]) if len(different) else shared
