"""How the experts' rows are divided among threads, and which threads compute them."""

from __future__ import annotations

import pytest

from llamafactory_kt.engines.onednn import schedule
from llamafactory_kt.engines.onednn.schedule import Part, compute, parts, together


def test_parts():
    """Experts without rows get no part; experts with many rows get several parts of similar size."""
    assert parts([0, 3, 0, 1, 0], threads=2) == [Part(1, 0, 3), Part(3, 3, 4)]
    assert parts([90, 95, 160], threads=16) == [Part(0, 0, 90), Part(1, 90, 185), Part(2, 185, 265), Part(2, 265, 345)]
    assert [part.stop - part.start for part in parts([1000, 1, 47], threads=1)] == [250, 250, 250, 250, 1, 47]
    assert [part.stop - part.start for part in parts([1024, 128, 5], threads=4)] == [73, 73, 73, 73, 73, 73, 74] * 2 + [
        64,
        64,
        5,
    ]
    assert parts([0, 0], threads=2) == []


def test_together():
    every = [Part(0, 0, 4), Part(1, 4, 6), Part(2, 6, 20), Part(3, 20, 21)]
    assert list(together(every, most=6)) == [every[:2], [every[2]], [every[3]]]
    assert list(together(every, most=100)) == [every] and list(together([], most=1)) == []


@pytest.mark.parametrize(
    ("number", "threads", "alone"), [(6, 2, True), (3, 2, True), (1, 2, False), (9, 8, False), (6, 1, False)]
)
def test_few_experts_are_computed_by_all_threads(monkeypatch, number, threads, alone):
    teams: list[int] = []

    def team(work, size):
        teams.append(size)
        work()

    monkeypatch.setattr(schedule, "in_team", team)
    some, computed = [Part(expert, 64 * expert, 64 * (2 * expert + 1)) for expert in range(number)], []
    compute(some, threads, lambda *given: computed.append(given))
    assert teams == [threads] * alone
    if alone:
        assert computed == [([part], 1) for part in reversed(some)], "the longest first"
    else:
        assert computed == [(few, threads) for few in together(some, 64 * threads)]
