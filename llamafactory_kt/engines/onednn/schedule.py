"""How PyTorch's threads share the experts: each thread computes experts by itself, or all compute one together.

Threads that compute an expert together synchronise after each of its products, and an expert has few rows. So they do that only where
there are fewer experts than threads, as for one token on many cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from ...matmul.openmp import in_team

FEWEST_ROWS, MOST_ROWS = 64, 256
"""rows of a part. With fewer, reading the weights dominates; with more, one thread may be left with the last part"""
_PARTS = 4
"""parts for each thread, where there are rows enough, so that nobody waits long for the last ones"""
_BUSY = 0.7
"""threads compute by themselves if that keeps them busy for this share of the time at least"""
_ROWS = 64
"""rows for each thread, where all compute together: the core's L2 cache holds them at each step"""


class Part(NamedTuple):
    """Rows of one expert."""

    expert: int
    start: int
    stop: int


def parts(counts: Sequence[int], threads: int) -> list[Part]:
    """The experts that have rows; those with many are divided.

    Args:
        counts: rows of each expert, which lie one after the other.
    """
    aim = max(FEWEST_ROWS, min(MOST_ROWS, sum(counts) // (_PARTS * threads)))
    found: list[Part] = []
    start = 0
    for expert, rows in enumerate(counts):
        if not rows:
            continue
        number = max(1, round(rows / aim))
        ends = [start + rows * part // number for part in range(number + 1)]
        found.extend(Part(expert, *both) for both in pairwise(ends))
        start += rows
    return found


def together(every: Sequence[Part], most: int) -> Iterator[list[Part]]:
    """Groups of parts in order, each of at most ``most`` rows, or a single part."""
    some: list[Part] = []
    for part in every:
        if some and part.stop - some[0].start > most:
            yield some
            some = []
        some.append(part)
    if some:
        yield some


def compute(some: Sequence[Part], threads: int, call: Callable[[Sequence[Part], int], None]) -> None:
    """Compute parts with ``call(parts, threads that compute them)``: each thread takes a part after the other, or all threads compute
    group after group together."""
    if threads == 1 or len(some) < _BUSY * threads * -(-len(some) // threads):
        for few in together(some, _ROWS * threads):
            call(few, threads)
        return
    left = iter(sorted(some, key=lambda part: part.start - part.stop))  # those with most rows first

    def work() -> None:
        for part in left:
            call([part], 1)

    in_team(work, threads)
