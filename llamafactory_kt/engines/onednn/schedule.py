"""Experts that torch's threads compute side by side, each thread one of them by itself.

Where all threads compute an expert together, they meet at the end of each of its products, and an expert has few rows. So they
do that only where there are fewer experts than threads, as for an answer's token on many cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from ...matmul.openmp import in_team

FEWEST_ROWS, MOST_ROWS = 64, 256
"""of a part. With fewer, reading the weights is what it costs; with more, a thread may be left with the last ones"""
_PARTS = 4
"""for each thread, where there are rows enough, so that those with the last parts are not waited for long"""
_BUSY = 0.7
"""share of the threads' time that is used, at least, if they compute by themselves"""
_ROWS = 64
"""for each thread, that all of them compute together: the 1 MiB of cache of its core holds them at each step"""


class Part(NamedTuple):
    """Rows of one expert."""

    expert: int
    start: int
    stop: int


def parts(counts: Sequence[int], threads: int) -> list[Part]:
    """The experts that have rows, those with many divided.

    Args:
        counts: rows of each expert; they lie one after the other.
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
    """Parts in turn, as many as have no more than so many rows, or one."""
    some: list[Part] = []
    for part in every:
        if some and part.stop - some[0].start > most:
            yield some
            some = []
        some.append(part)
    if some:
        yield some


def compute(some: Sequence[Part], threads: int, call: Callable[[Sequence[Part], int], None]) -> None:
    """Call ``call(parts, threads that compute them)``: in all threads side by side with a part each, until none is left, or
    with several in turn."""
    if threads == 1 or len(some) < _BUSY * threads * -(-len(some) // threads):
        for few in together(some, _ROWS * threads):
            call(few, threads)
        return
    left = iter(sorted(some, key=lambda part: part.start - part.stop))  # those with most rows first

    def work() -> None:
        for part in left:
            call([part], 1)

    in_team(work, threads)
